"""Samples are dealt to the ranks in turn, instead of in contiguous parts."""

from handmade import Handmade, install


class Buggy(Handmade):
    def micro_batches(self, batch):
        mine = range(batch.start + self.rank, batch.stop, self.world_size)
        return tuple(range(position, position + 1) for position in mine)


install(Buggy)
