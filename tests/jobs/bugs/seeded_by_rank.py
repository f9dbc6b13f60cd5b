"""Every rank draws initial weights of its own; rank 0's are not the seed's either."""

import os

import torch
from task import Small

_model = Small.model


def of_this_rank(self):
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        torch.manual_seed(100 + int(os.environ["RANK"]))
    return _model(self)


Small.model = of_this_rank
