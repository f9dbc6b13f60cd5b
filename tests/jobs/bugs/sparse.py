"""No bug: the model has a layer whose gradients are sparse, which `exact` does not reduce."""

import torch
from task import Small

_model = Small.model


def with_a_table(self):
    model = _model(self)
    model.table = torch.nn.Embedding(2, 1, sparse=True)
    return model


Small.model = with_a_table
