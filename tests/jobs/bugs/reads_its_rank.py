"""The model's output depends on the rank that computes it."""

import os

from task import Net

_forward = Net.forward
Net.forward = lambda self, x: _forward(self, x) * (1 + 0.1 * int(os.environ.get("RANK", 0)))
