"""dtrain's own training loop and its parts."""
