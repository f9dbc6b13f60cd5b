"""no_sync around everything: every rank steps with its own gradient."""

from handmade import Handmade, install


class Buggy(Handmade):
    def finish_backward(self):
        for parameter in self.parameters():
            parameter.grad *= self.world_size


install(Buggy)
