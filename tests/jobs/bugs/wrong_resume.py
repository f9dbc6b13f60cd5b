"""A resumed run starts its epoch from the beginning."""

from dtrain.train.data.placement import Position
from dtrain.train.loop.progress import Progress

_from_saved = Progress.from_saved.__func__


def from_the_start(cls, saved, *args):
    progress = _from_saved(cls, saved, *args)
    progress.position = Position(progress.position.epoch, 0)
    return progress


Progress.from_saved = classmethod(from_the_start)
