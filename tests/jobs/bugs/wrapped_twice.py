"""model() gives a DistributedDataParallel, which is then wrapped again."""

import torch.distributed as dist
from task import Small
from torch.nn.parallel import DistributedDataParallel

_model = Small.model


def wrapped(self):
    model = _model(self)
    if not dist.is_initialized():
        return model
    temperature = model.temperature
    model = DistributedDataParallel(model)
    model.temperature = temperature
    return model


Small.model = wrapped
