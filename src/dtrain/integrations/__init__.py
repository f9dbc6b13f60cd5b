"""Trainings written for other frameworks: Lightning, Keras, and plain scripts."""
