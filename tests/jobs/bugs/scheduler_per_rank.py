"""The scheduler is stepped once for each process."""

import os

from torch.optim.lr_scheduler import LambdaLR

_step = LambdaLR.step


def often(self, *args):
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for _ in range(1 if self._step_count == 0 else world_size):  # the first is the constructor's
        _step(self, *args)


LambdaLR.step = often
