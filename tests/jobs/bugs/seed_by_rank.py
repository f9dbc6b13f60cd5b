"""The order of the samples is shuffled with the rank in the seed."""

import os

from dtrain.train.data import order

_permutation = order.Permutation


def of_this_rank(n, seed, epoch, **options):
    return _permutation(n, seed + 1000 * int(os.environ.get("RANK", 0)), epoch, **options)


order.Permutation = of_this_rank
