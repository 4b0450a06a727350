"""What `shunter train` trains: data, models and metrics by kind of input. Needs the extra `train`."""
