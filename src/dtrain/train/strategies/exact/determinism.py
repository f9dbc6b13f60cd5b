"""Settings of the process under which the same arithmetic gives the same bits."""

from __future__ import annotations

import os

import torch
from torch.utils import deterministic

NUM_THREADS = 1
"""On every layout: sums over a tensor are cut into as many parts as there are threads, and the
launcher gives a rank cores / ranks of them."""


class Pinned:
    """Pins what would make results depend on the layout, until it is released.

    One thread. On a GPU also torch's deterministic algorithms and no trying-out of convolutions;
    an operation that has no deterministic version then raises, which names it.
    """

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._fill = deterministic.fill_uninitialized_memory
        self._benchmark = torch.backends.cudnn.benchmark
        torch.set_num_threads(NUM_THREADS)
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first GEMM
            torch.use_deterministic_algorithms(True)
            deterministic.fill_uninitialized_memory = False  # NaN into every new tensor
            torch.backends.cudnn.benchmark = False

    def release(self) -> None:
        """Put everything back."""
        torch.set_num_threads(self._threads)
        torch.use_deterministic_algorithms(self._deterministic)
        deterministic.fill_uninitialized_memory = self._fill
        torch.backends.cudnn.benchmark = self._benchmark
