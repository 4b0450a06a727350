"""What `shunter inspect` finds in a mixture-of-experts model, or in two checkpoints of one."""
