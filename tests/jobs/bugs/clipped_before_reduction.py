"""Each rank clips its own gradient, and the clipped ones are averaged."""

import torch
from handmade import Handmade, install


class Buggy(Handmade):
    def finish_backward(self):
        for parameter in self.parameters():
            parameter.grad *= self.world_size

    def clip_gradients(self, parameters, max_norm):
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        self.add_up()
        for parameter in self.parameters():
            parameter.grad /= self.world_size
        return norm


install(Buggy)
