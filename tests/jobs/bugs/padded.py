"""Shares are made equal by repeating samples, as DistributedSampler does."""

from handmade import Handmade, install


class Buggy(Handmade):
    def micro_batches(self, batch):
        share = -(-batch.size // self.world_size)
        mine = range(batch.start + self.rank * share, batch.start + (self.rank + 1) * share)
        inside = range(mine.start, min(mine.stop, batch.stop))
        again = range(batch.start, batch.start + len(mine) - len(inside))
        return tuple(part for part in (inside, again) if part)


install(Buggy)
