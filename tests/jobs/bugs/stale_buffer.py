"""After each step the buffers are put back to a copy made before training."""

from handmade import Handmade, install


class Buggy(Handmade):
    def prepare(self, module):
        super().prepare(module)
        self._copies = [buffer.clone() for buffer in module.model.buffers()]

    def finish_step(self):
        for buffer, copy in zip(self._module.model.buffers(), self._copies, strict=True):
            buffer.copy_(copy)


install(Buggy)
