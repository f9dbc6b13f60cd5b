"""Two wrappers, each of which divides by the number of processes."""

from handmade import Handmade, install


class Buggy(Handmade):
    def finish_backward(self):
        self.add_up()
        for parameter in self.parameters():
            parameter.grad /= self.world_size


install(Buggy)
