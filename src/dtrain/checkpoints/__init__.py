"""What `dtrain checkpoint` does with the checkpoints of a run. Nothing here needs torch."""
