"""Keras 3, on the torch backend: a compiled model with its data as a task.

In its own `fit`, Keras wraps DistributedDataParallel around a model (from 3.15 on). Here `fit`
never runs, so dtrain's strategy is the only one that wraps.
"""
