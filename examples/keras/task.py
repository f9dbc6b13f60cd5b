"""Handwritten digits with Keras 3: 1,797 images of 8 by 8 pixels that come with scikit-learn.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

from __future__ import annotations

import keras
import numpy as np
from sklearn.datasets import load_digits

from dtrain.keras import KerasTask

Arrays = tuple[np.ndarray, np.ndarray]


class Digits(KerasTask):
    """A compiled model and its data: loss, optimizer, schedule and metrics are Keras's."""

    def __init__(self, width: int = 64) -> None:
        self.width = width
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        self.x, self.y = pixels[order].astype("float32") / 16, labels[order].astype("int64")

    def compiled(self) -> keras.Model:
        """Two dense layers; Adam, with a learning rate that decays."""
        layers = [keras.Input((64,)), keras.layers.Dense(self.width, activation="relu")]
        model = keras.Sequential([*layers, keras.layers.Dense(10)])
        rate = keras.optimizers.schedules.CosineDecay(0.01, decay_steps=115)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
        return model

    def train_data(self) -> Arrays:
        """1,437 images."""
        return self.x[360:], self.y[360:]

    def eval_data(self) -> Arrays:
        """The other 360."""
        return self.x[:360], self.y[:360]
