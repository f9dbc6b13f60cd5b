"""Node agents find each other, and say who is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from torch.distributed import TCPStore

from dtrain import ports
from dtrain.node.rendezvous import NodeRendezvous
from dtrain.node.store import (
    NodeTaken,
    PeerFailed,
    RateLimitedCache,
    RendezvousFailed,
    RendezvousSettings,
)
from support.errors import assert_named


def settings(node_rank: int, port: int, **changes: object) -> RendezvousSettings:
    base = RendezvousSettings(
        run_id="run/0",
        host="127.0.0.1",
        port=port,
        node_rank=node_rank,
        node_name=f"host-{node_rank}",
        min_nodes=2,
        max_nodes=2,
        join_timeout_s=20,
        token=b"t" * 32,
        names=("host-0", "host-1", "host-2"),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@contextmanager
def nodes(count: int, **changes: object) -> Iterator[list[NodeRendezvous]]:
    port = ports.free_candidate("127.0.0.1", "test-rendezvous")
    changes = {"min_nodes": count, "max_nodes": count, **changes}
    made = [NodeRendezvous(settings(rank, port, **changes)) for rank in range(count)]
    try:
        yield made
    finally:
        for node in reversed(made):
            node.shutdown()


def meet(made: list[NodeRendezvous]) -> list[tuple[int, int, int]]:
    with ThreadPoolExecutor(len(made)) as pool:
        infos = list(pool.map(NodeRendezvous.next_rendezvous, made))
    return [(i.rank, i.world_size, i.bootstrap_store_info.master_port) for i in infos]


def test_ranks_are_the_launchers_and_every_round_has_a_store_of_its_own() -> None:
    with nodes(3) as made:
        first = meet(made)
        assert [(rank, size) for rank, size, _ in first] == [(0, 3), (1, 3), (2, 3)]
        assert all(node.num_nodes_waiting() == 0 for node in made)
        worker_store = TCPStore("127.0.0.1", first[0][2], is_master=False)
        worker_store.set("address", "of the dead")
        second = meet(made)
        assert len({port for *_, port in second}) == 1
        fresh = TCPStore("127.0.0.1", second[0][2], is_master=False)
        assert not fresh.check(["address"])


def test_a_node_that_wants_a_restart_is_seen_waiting_by_the_others() -> None:
    with nodes(2) as made:
        meet(made)
        again = threading.Thread(target=made[1].next_rendezvous)
        again.start()
        try:
            for _ in range(200):
                if made[0].num_nodes_waiting():
                    break
                threading.Event().wait(0.05)
            assert made[0].num_nodes_waiting() == 1
        finally:
            made[0].next_rendezvous()
            again.join(20)
        assert [node.round for node in made] == [1, 1]


def test_a_missing_node_is_named_before_and_at_the_timeout() -> None:
    port = ports.free_candidate("127.0.0.1", "test-missing")
    notices: list[str] = []
    head = NodeRendezvous(settings(0, port, join_timeout_s=4), notice=notices.append)
    try:
        with pytest.raises(
            RendezvousFailed, match=r"node 1 \(host-1\) did not join: 1 of 2"
        ) as info:
            head.next_rendezvous()
    finally:
        head.shutdown()
    assert info.value.missing == [1]
    assert_named(notices[0], ["1/2 ", "node 0 (host-0)", "waiting for node 1 (host-1)"])


def test_a_head_that_cannot_be_reached_is_named() -> None:
    port = ports.free_candidate("127.0.0.1", "test-unreachable")
    with pytest.raises(RendezvousFailed, match=rf"node 0 \(host-0\) at 127.0.0.1:{port}") as info:
        NodeRendezvous(settings(1, port, join_timeout_s=0.5))
    assert info.value.missing == [0]


def test_the_error_of_a_busy_port_names_what_to_do() -> None:
    with ports.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousFailed, match=rf"port {port}.*--rdzv-endpoint"):
            NodeRendezvous(settings(0, port))


def test_of_two_agents_of_one_rank_one_is_refused() -> None:
    with nodes(2) as made:
        twin = NodeRendezvous(settings(1, made[0].settings.port))
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(node.next_rendezvous) for node in made]
            waiting.append(pool.submit(twin.next_rendezvous))
            errors = [future.exception(20) for future in waiting]
        assert sum(error is None for error in errors) == 2
        assert sum(isinstance(error, NodeTaken) for error in errors) == 1
        twin.shutdown()


def test_an_agent_that_comes_as_a_node_that_lives_is_refused_and_the_others_continue() -> None:
    with nodes(2) as made:
        meet(made)
        twin = NodeRendezvous(settings(1, made[0].settings.port))
        with pytest.raises(NodeTaken):
            twin.next_rendezvous()
        twin.shutdown()
        assert [node.num_nodes_waiting() for node in made] == [0, 0]
        assert not made[0].is_closed()


def test_a_node_that_was_not_there_before_may_come_late() -> None:
    with nodes(2, min_nodes=2, max_nodes=3, last_call_s=0.1) as made:
        meet(made)
        late = settings(2, made[0].settings.port, min_nodes=2, max_nodes=3, last_call_s=0.1)
        made.append(NodeRendezvous(late))
        assert [rank for rank, *_ in meet(made)] == [0, 1, 2]


def test_an_agent_that_comes_as_a_node_that_died_takes_its_place() -> None:
    with nodes(2) as made:
        meet(made)
        made[1].shutdown()
        made[1] = NodeRendezvous(settings(1, made[0].settings.port))
        assert [rank for rank, *_ in meet(made)] == [0, 1]


def test_another_runs_store_is_refused() -> None:
    with nodes(2) as made, pytest.raises(RendezvousFailed, match="'run/0'"):
        NodeRendezvous(settings(1, made[0].settings.port, run_id="other/0"))


def test_giving_up_reaches_all() -> None:
    with nodes(2) as made:
        meet(made)
        made[1].close_with("rank 3 failed")
        with pytest.raises(PeerFailed, match=r"node 1 \(host-1\): rank 3 failed"):
            made[0].num_nodes_waiting()


def test_a_node_without_heartbeat_is_lost() -> None:
    with nodes(2, lost_after_s=2.0) as made:
        meet(made)
        made[1].shutdown()
        with pytest.raises(RendezvousFailed, match=r"node 1 \(host-1\) was lost") as info:
            made[0].next_rendezvous()
        assert info.value.missing == [1]


def lost_while_training(head: NodeRendezvous) -> int:
    """Ask as the head's agent does until a node waits; how many wait then."""
    deadline = time.monotonic() + 30  # without a heartbeat for 2 s
    while time.monotonic() < deadline:
        if waiting := head.num_nodes_waiting():
            return waiting
        threading.Event().wait(0.05)
    raise AssertionError("no node was lost in 30 s")


def test_a_node_lost_while_workers_run_is_noticed_by_the_head_and_reported_to_all() -> None:
    with nodes(3, lost_after_s=2.0) as made:
        meet(made)
        made[2].shutdown()
        with pytest.raises(PeerFailed, match=r"node 2 \(host-2\) was lost") as info:
            lost_while_training(made[0])
        assert info.value.record is not None
        assert (info.value.record.kind, info.value.record.node_rank) == ("node_lost", 2)
        with pytest.raises(PeerFailed, match=r"node 2 \(host-2\) was lost"):
            made[1].num_nodes_waiting()


def test_an_elastic_run_goes_on_without_a_node_whose_end_was_seen() -> None:
    with nodes(2, min_nodes=1, max_nodes=2, last_call_s=0.1) as made:
        meet(made)
        made[0].mark_lost(1)
        assert lost_while_training(made[0]) == 1
        assert [(rank, size) for rank, size, _ in meet(made[:1])] == [(0, 1)]
        assert made[0].num_nodes_waiting() == 0


def test_elastic_goes_on_with_fewer_after_the_last_call() -> None:
    with nodes(2, min_nodes=1, max_nodes=3, last_call_s=0.5) as made:
        assert [(rank, size) for rank, size, _ in meet(made)] == [(0, 2), (1, 2)]


def test_all_are_done_only_when_every_node_is() -> None:
    with nodes(2) as made:
        meet(made)
        assert not made[0].all_done(done_here=True)
        assert not made[0].all_done(done_here=True)
        assert made[1].all_done(done_here=True)
        assert made[0].all_done(done_here=True)


def test_of_many_nodes_each_asks_the_head_less_often() -> None:
    assert (RateLimitedCache(50).pause_s, RateLimitedCache(1050).pause_s) == (0, 1.0)
    with nodes(2) as made:
        meet(made)
        assert made[0].num_nodes_waiting() == 0
        made[0]._cache.pause_s = 3600.0
        again = threading.Thread(target=made[1].next_rendezvous)
        again.start()
        try:
            made[0]._wait_for("1/node/1")
            assert made[0].num_nodes_waiting() == 0  # as it was told a moment ago
        finally:
            made[0].next_rendezvous()
            again.join()
        assert made[0].num_nodes_waiting() == 0  # of the next round
