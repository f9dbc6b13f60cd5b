"""Runs that are kept at a URL, for hosts that share no disk."""
