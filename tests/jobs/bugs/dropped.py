"""Shares are made equal by leaving samples out, as drop_last does."""

from handmade import Handmade, install


class Buggy(Handmade):
    def micro_batches(self, batch):
        share = batch.size // self.world_size
        start = batch.start + self.rank * share
        return (range(start, start + share),)


install(Buggy)
