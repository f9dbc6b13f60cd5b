"""Checks that the replicas are still one model: before, during and between steps."""
