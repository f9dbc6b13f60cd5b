"""Each rank takes the mean over its own samples, and the ranks' means are averaged."""

import torch
import torch.distributed as dist
from handmade import Handmade, install


class Buggy(Handmade):
    def loss(self, batch, num_samples, *, last):
        total, weight = super().loss(batch, num_samples, last=last)
        everyone = torch.tensor(float(weight), dtype=torch.float64)
        dist.all_reduce(everyone)
        return total * (float(everyone) / (self.world_size * float(weight))), weight


install(Buggy)
