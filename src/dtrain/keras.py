"""A compiled Keras 3 model, on the torch backend, as a task: see `KerasTask`."""

from dtrain.integrations.keras.task import KerasTask

__all__ = ["KerasTask"]
