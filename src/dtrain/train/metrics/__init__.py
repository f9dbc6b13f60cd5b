"""Logs, metrics and events of a training run."""
