"""A training with a loop of its own: how it is run, and what it may take from dtrain."""
