"""Handwritten digits with Keras 3: 1,797 images of 8 by 8 pixels from scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits


def digits(width: int = 64) -> tuple[keras.Model, dict[str, Any]]:
    """Return a compiled model and arguments of `model.fit`: 1,437 images, and 360 to evaluate."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = pixels[order].astype("float32") / 16, labels[order].astype("int64")

    layers = [keras.Input((64,)), keras.layers.Dense(width, activation="relu")]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    rate = keras.optimizers.schedules.CosineDecay(0.01, decay_steps=115)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model, {"x": x[360:], "y": y[360:], "validation_data": (x[:360], y[:360])}
