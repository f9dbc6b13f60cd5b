"""What `dtrain top` shows: a run while it runs."""
