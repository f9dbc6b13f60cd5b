"""One layer's gradients are reduced by a hook of its own, and then with all others."""

from handmade import Handmade, install


class Buggy(Handmade):
    def finish_backward(self):
        self.add_up()
        for parameter in self._module.model.last.parameters():
            parameter.grad *= self.world_size


install(Buggy)
