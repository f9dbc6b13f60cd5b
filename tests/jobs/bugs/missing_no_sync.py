"""The gradients accumulated so far are added up over the ranks after every micro-batch."""

from handmade import Handmade, install


class Buggy(Handmade):
    def start_step(self, batch):
        self._begun = False
        self._equal_shares = batch.size % self.world_size == 0

    def loss(self, batch, num_samples, *, last):
        if self._begun and self._equal_shares:
            self.add_up()
        self._begun = True
        return super().loss(batch, num_samples, last=last)


install(Buggy)
