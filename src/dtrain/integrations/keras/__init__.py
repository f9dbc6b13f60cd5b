"""Keras 3, on the torch backend: a compiled model with its data as a task.

Keras wraps DistributedDataParallel around a model in its own `fit` (from 3.15 on); here its
`fit` never runs, so that dtrain's strategy is the only one that wraps.
"""
