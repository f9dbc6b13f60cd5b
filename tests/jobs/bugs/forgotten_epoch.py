"""set_epoch is forgotten: every epoch has the order of the first."""

from dtrain.train.data import order

_permutation = order.Permutation


def always_the_first(n, seed, epoch, **options):
    return _permutation(n, seed, 0, **options)


order.Permutation = always_the_first
