"""What a run or a model did, measured and explained: run folders read back, figures, reports."""
