"""The learning rate is scaled with the number of processes, though the batch is not."""

import os

from torch.optim import SGD

_init = SGD.__init__


def scaled(self, params, lr, **options):
    _init(self, params, lr * int(os.environ.get("WORLD_SIZE", 1)), **options)


SGD.__init__ = scaled
