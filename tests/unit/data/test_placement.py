"""Where samples go: every one once, in order, for any sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dtrain.train.data.loader import eval_requests, train_requests
from dtrain.train.data.order import shuffled
from dtrain.train.data.permutation import Permutation
from dtrain.train.data.placement import EpochPlan, GlobalBatch, Position, pieces, shard

sizes = st.integers(1, 60)


@given(n=st.integers(0, 200), world_size=st.integers(1, 70))
def test_shards_are_a_partition_into_nearly_equal_parts(n: int, world_size: int) -> None:
    shards = [shard(n, rank, world_size) for rank in range(world_size)]
    assert [i for part in shards for i in part] == list(range(n))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert len(shards[0]) > 0 or n == 0  # rank 0's buffers are the ones that stay


@given(n=st.integers(0, 200), world_size=st.integers(1, 10), factor=st.integers(1, 7))
def test_boundaries_are_among_those_of_multiples(n: int, world_size: int, factor: int) -> None:
    few = {shard(n, rank, world_size).start for rank in range(world_size)}
    many = {shard(n, rank, world_size * factor).start for rank in range(world_size * factor)}
    assert few <= many


@given(n=st.integers(0, 100), size=st.one_of(st.none(), st.integers(1, 120)))
def test_pieces(n: int, size: int | None) -> None:
    cut = pieces(range(n), size)
    assert [i for piece in cut for i in piece] == list(range(n))
    assert all(cut)
    assert size is None or all(len(piece) == size for piece in cut[:-1])


@given(
    n=sizes,
    batch=sizes,
    epochs=st.integers(1, 3),
    world_size=st.integers(1, 9),
    micro=st.one_of(st.none(), st.integers(1, 20)),
)
def test_every_epoch_is_consumed_in_order_by_any_number_of_ranks(
    n: int, batch: int, epochs: int, world_size: int, micro: int | None
) -> None:
    course = EpochPlan(n, batch, epochs, None)
    batches = list(course.batches(0, Position()))
    assert len(batches) == course.total_steps
    ranks = [
        train_requests(
            batches,
            shuffled(n, 5),
            lambda one, rank=rank: one.micro_batches(rank, world_size, micro),
        )
        for rank in range(world_size)
    ]
    for step, one in enumerate(batches):
        assert one.step == step
        order = Permutation(n, 5, one.epoch).block(one.start, one.stop).tolist()
        mine = []
        for rank, requests in enumerate(ranks):
            for part in one.micro_batches(rank, world_size, micro):
                request = next(requests)
                assert request.epoch == one.epoch
                assert len(request.samples) == len(part)
                mine += request.samples.tolist()
        assert mine == order
    assert all(next(requests, None) is None for requests in ranks)


@given(n=sizes, batch=sizes, epochs=st.integers(1, 3), data=st.data())
def test_a_course_goes_on_from_any_step(
    n: int, batch: int, epochs: int, data: st.DataObject
) -> None:
    course = EpochPlan(n, batch, epochs, None)
    batches = list(course.batches(0, Position()))
    done = data.draw(st.integers(0, len(batches)))
    position = batches[done - 1].after if done else Position()
    assert list(course.batches(done, position)) == batches[done:]


def test_the_end_that_comes_first() -> None:
    for epochs, steps, total in ((2, None, 8), (None, 5, 5), (2, 5, 5), (1, 5, 4), (2, 100, 8)):
        course = EpochPlan(50, 16, epochs, steps)
        assert course.total_steps == total
        assert len(list(course.batches(0, Position()))) == total


@given(n=sizes, world_size=st.integers(1, 70), batch=st.integers(1, 70))
def test_evaluation_visits_every_sample_once(n: int, world_size: int, batch: int) -> None:
    visited = [
        sample
        for rank in range(world_size)
        for request in eval_requests(n, rank, world_size, batch)
        for sample in request.samples.tolist()
    ]
    assert visited == list(range(n))


@given(
    shares=st.lists(st.integers(0, 30), min_size=1, max_size=9).map(tuple),
    start=st.integers(0, 100),
    micro=st.one_of(st.none(), st.integers(1, 9)),
)
def test_shares_that_ranks_bring_are_dealt_in_turn(
    shares: tuple[int, ...], start: int, micro: int | None
) -> None:
    world_size = len(shares)
    batch = GlobalBatch(0, 0, start, start + sum(shares), shares=shares)
    parts = [batch.micro_batches(rank, world_size, micro) for rank in range(world_size)]
    assert [sum(map(len, each)) for each in parts] == list(shares)
    dealt = [position for each in parts for part in each for position in part]
    assert dealt == list(range(batch.start, batch.stop))
    assert len(parts[batch.fullest()]) == max(map(len, parts))
    assert batch.reaches_every_rank(world_size) == all(parts)
