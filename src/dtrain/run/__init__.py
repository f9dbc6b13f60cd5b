"""A run and how it stands: its directory, attempts, events, failures, verdict and lasting copy."""
