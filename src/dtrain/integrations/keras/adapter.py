"""The adapter that makes a task of a function that returns a compiled Keras model."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from dtrain.train.seeding import RandomState


class KerasAdapter:
    def matches(self, factory: Callable[..., Any], trainer: str) -> bool:
        """Return whether Keras is imported; only the result of the call shows if it is a model."""
        return "keras" in sys.modules

    def adapt(self, make: functools.partial[Any], name: str, trainer: str) -> Any:
        keras = sys.modules["keras"]
        before = RandomState.capture()
        if inspect.isfunction(make.func):
            keras.utils.clear_session()  # names count up, and checkpoints use the names
        made = make()
        model = made[0] if isinstance(made, tuple) and made else made
        if not isinstance(model, keras.Model):
            return made
        from dtrain.integrations.keras.compiled_model import CompiledModelTask

        return CompiledModelTask(make, made, name, before)
