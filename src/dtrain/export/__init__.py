"""Writes a trained model for other programs, and proves that it is the same model."""
