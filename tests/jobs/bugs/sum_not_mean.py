"""The ranks' gradients, each a mean already, are added up and not divided."""

from handmade import Handmade, install


class Buggy(Handmade):
    def finish_backward(self):
        self.add_up()
        for parameter in self.parameters():
            parameter.grad *= self.world_size


install(Buggy)
