"""The rendezvous of the node agents of one run: a rendezvous handler for torch's agent.

torch's own c10d handler polls once a second and orders nodes by address text. It cannot name a
missing node, and gives workers a store that still holds the addresses of the dead (pytorch#135712).
Here the node rank is the launcher's, and a round completes as soon as the last node joins. Missing
nodes are known by name, and every round has its own store.

The head (node 0) serves the store, only to processes that have the token of the attempt. Round n is
complete when the head writes its members. An agent that wants to restart the workers joins round
n + 1. The others see it as a waiting node, so they join too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from dtrain import ports
from dtrain.node import store as stores
from dtrain.node.heartbeat import Heartbeats, silence_message
from dtrain.node.sealed import HeadGone, Store
from dtrain.node.store import Member, PeerFailed, RendezvousFailed, RendezvousSettings, Round
from dtrain.run import failures
from dtrain.run.failures import FailureRecord
from dtrain.waiting import poll

log = logging.getLogger(__name__)

_POLL_S = 0.02
_LEAVE_S = 5.0


class NodeRendezvous(RendezvousHandler):
    """Meets the other node agents over one store on the head node."""

    def __init__(
        self,
        settings: RendezvousSettings,
        listener: socket.socket | None = None,
        notice: Callable[[str], None] = log.info,
    ) -> None:
        """Connect to the store, or serve it.

        Args:
            settings: this node, and the address of the head.
            listener: on the head, a socket that already listens on the port, so that no other
                process can have taken it in between. None opens one.
            notice: called with a sentence that names the missing nodes.

        Raises:
            RendezvousFailed: the head does not answer in time, the port is taken, or another
                run answers there.
        """
        self.settings = settings
        self.round = -1
        self.members: list[Member] = []
        self._notice = notice
        self._is_head = settings.node_rank == 0
        self._worker_store: TCPStore | None = None
        self._done_round = -1
        self._cache = stores.RateLimitedCache(settings.max_nodes)
        self._server = stores.serve(settings, listener) if self._is_head else None
        self._store: Store = (
            stores.connect(settings, notice) if self._server is None else self._server.table
        )
        self._address = ports.address_towards(settings.host, settings.port)
        self._heartbeats = Heartbeats(self._store, settings.node_rank, settings.lost_after_s)

    # -- methods that torch's agent calls ----------------------------------------------------

    def get_backend(self) -> str:
        return "dtrain"

    @property
    def use_agent_store(self) -> bool:
        """Return True: workers use the store that the head made for this round."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round and wait until it is complete.

        Raises:
            RendezvousFailed: nodes are missing after the join timeout.
            NodeTaken: another agent has this node's rank.
            PeerFailed: a node failed meanwhile.
        """
        number = self._join()
        if self._is_head:
            self._gather(number)
        described = Round.from_json(self._wait_for(f"{number}/members"), self.settings)
        self.members = described.members
        self.round = number
        group_rank = described.node_ranks.index(self.settings.node_rank)
        worker_store = RendezvousStoreInfo(self.settings.host, described.port)
        # ranks follow from the node rank, and dtrain has its own exit barrier
        unused = HashStore()
        return RendezvousInfo(unused, group_rank, len(self.members), worker_store)

    def num_nodes_waiting(self) -> int:
        """Return how many nodes have already joined the next round.

        Raises:
            PeerFailed: a node failed, or the head is gone.
        """
        return self._cache(f"{self.round + 1}/count", self._ask_waiting)

    def _ask_waiting(self) -> int:
        keys = ["closed", f"{self.round + 1}/count"]
        closed, count = self._call(lambda: self._store.get_all(keys))
        if closed is not None:
            raise PeerFailed.from_json(closed)
        return int(count or 0) or int(self._is_head and self._without_lost())

    def is_closed(self) -> bool:
        return self._call(lambda: self._store.get("closed")) is not None

    def set_closed(self) -> None:
        self.close_with("closed")

    def get_run_id(self) -> str:
        return self.settings.run_id

    def shutdown(self) -> bool:
        """Stop the heartbeat. The store ends with the process."""
        self._heartbeats.stop()
        return True

    # -- methods that dtrain's agent calls -------------------------------------------------------

    def close_with(
        self, reason: str, record: FailureRecord | None = None, signal: int | None = None
    ) -> None:
        """Ask all nodes to stop, with the reason. A head that is already gone is not informed.

        Args:
            reason: the reason in words.
            record: the failure record of the cause, for nodes that do not share this node's disk.
            signal: the signal when this node was asked to stop and nothing failed.
        """
        me = self.settings.name_of(self.settings.node_rank)
        why = PeerFailed(f"{me}: {reason}", record, signal)
        try:
            if self._store.add("closers", 1) == 1:  # the first reason is the cause
                self._store.set("closed", why.to_json())
        except HeadGone:
            log.info("the head is gone, so this reason was not sent: %s", reason)

    def mark_lost(self, node_rank: int) -> None:
        """Mark a node as lost. Its end was seen on this host."""
        self._heartbeats.mark_lost(node_rank)

    def all_done(self, *, done_here: bool) -> bool:
        """Return whether the workers of every node have succeeded in this round.

        Args:
            done_here: whether those of this node have. The first time, this is reported.
        """
        if done_here and self._done_round != self.round:
            self._done_round = self.round
            self._call(lambda: self._store.add(f"{self.round}/done", 1))
        key = f"{self.round}/done"
        done = self._cache(key, lambda: int(self._call(lambda: self._store.add(key, 0))))
        return done == len(self.members)

    def tell(self, key: str, text: str) -> None:
        """Set a text of this round for the other nodes."""
        self._call(lambda: self._store.set(f"{self.round}/{key}", text))

    def ask(self, keys: Sequence[str]) -> list[str | None]:
        """Return texts of this round. None for each that is not there yet.

        Raises:
            PeerFailed: a node failed meanwhile.
        """
        self._raise_if_closed()
        named = [f"{self.round}/{key}" for key in keys]
        found: list[str | None] = self._call(lambda: self._store.get_all(named))
        return found

    def add(self, key: str, amount: int = 1) -> int:
        """Add to a counter of this round. Return its new value."""
        return int(self._call(lambda: self._store.add(f"{self.round}/{key}", amount)))

    def leave(self) -> None:
        """Leave the rendezvous for ever.

        The head leaves last, because the others still read its store.
        """
        self._heartbeats.stop()
        with contextlib.suppress(HeadGone):  # the head may be gone before it has answered
            self._store.add("left", 1)
            if self._is_head:
                poll(lambda: self._store.add("left", 0) >= len(self.members), _LEAVE_S, _POLL_S)

    # -- joining -----------------------------------------------------------------------------

    def _join(self) -> int:
        number, is_new = self.round + 1, self.round < 0
        if is_new:  # a node that comes late joins the round that is open now
            number = int(self._call(lambda: self._store.add("completed", 0)))
        me = Member(self.settings.node_rank, self.settings.node_name, self._address)
        taken = (
            is_new
            and self._has_member(number - 1, me)
            and self._call(self._heartbeats.has_duplicate)
        )
        if taken or self._call(lambda: self._store.add(f"{number}/here/{me.node_rank}", 1)) > 1:
            raise stores.NodeTaken(
                f"another host already has node rank {me.node_rank}; give each its own --node-rank"
            )
        self._call(lambda: self._store.set(f"{number}/node/{me.node_rank}", me.to_json()))
        self._call(lambda: self._store.add(f"{number}/count", 1))
        return number

    def _has_member(self, number: int, me: Member) -> bool:
        """Return whether an agent already had this node's rank in a round."""
        key = f"{number}/node/{me.node_rank}"
        return self._call(lambda: self._store.get(key)) is not None

    def _gather(self, number: int) -> None:
        """Wait, on the head, for the nodes of a round, then write its members."""
        settings = self.settings
        started = time.monotonic()
        enough_since: float | None = None
        notice_at = started + stores.FIRST_NOTICE_S
        while (count := self._count(number)) < settings.max_nodes:
            self._raise_if_closed()
            now = time.monotonic()
            if count >= settings.min_nodes:
                enough_since = enough_since or now
                if now - enough_since >= settings.last_call_s:
                    break
            elif lost := self._lost(number):
                raise RendezvousFailed(f"{self._named(lost)} was lost", lost)
            elif now - started > settings.join_timeout_s:
                missing = self._missing(number)
                raise RendezvousFailed(
                    f"{self._named(missing)} did not join: {count} of {settings.max_nodes} "
                    f"nodes after {settings.join_timeout_s:.0f} s",
                    missing,
                )
            if now >= notice_at:
                self._report_missing(number, count, now - started)
                notice_at = now + 2 * (now - started)
            time.sleep(_POLL_S)
        keys = [f"{number}/node/{rank}" for rank in self._joined(number)]
        members = [Member.from_json(text) for text in self._store.get_all(keys) if text]
        # the last round's store for workers is dropped: its addresses are dead
        key = f"{settings.run_id}/workers/{number}"
        self._worker_store, port = stores.serve_anywhere(settings, key)
        self._store.add("completed", 1)
        self._store.set(f"{number}/members", Round(members, port).to_json())

    def _report_missing(self, number: int, count: int, waited_s: float) -> None:
        joined = ", ".join(self.settings.name_of(rank) for rank in self._joined(number))
        self._notice(
            f"{count}/{self.settings.max_nodes} nodes joined ({joined}); waiting for "
            f"{self._named(self._missing(number))}, {waited_s:.0f} s so far"
        )

    # -- the store ---------------------------------------------------------------------------

    def _wait_for(self, key: str) -> str:
        """Wait for a key. The head itself ends a wait that has lasted too long."""
        deadline = time.monotonic() + self.settings.join_timeout_s + 10
        while (text := self._call(lambda: self._store.get(key))) is None:
            self._raise_if_closed()
            if time.monotonic() > deadline:
                raise RendezvousFailed("the head did not complete the round", [0])
            time.sleep(stores.wait_s(self.settings.max_nodes))
        return str(text)

    def _raise_if_closed(self) -> None:
        if (closed := self._call(lambda: self._store.get("closed"))) is not None:
            raise PeerFailed.from_json(closed)

    def _call(self, request: Callable[[], Any]) -> Any:
        """Send a request to the store. A head that no longer answers is a peer that failed."""
        try:
            return request()
        except HeadGone as error:
            raise PeerFailed(f"{self.settings.name_of(0)} is gone: {error}") from error

    # -- members ---------------------------------------------------------------------------------

    def _count(self, number: int) -> int:
        return int(self._call(lambda: self._store.add(f"{number}/count", 0)))

    def _joined(self, number: int) -> list[int]:
        keys = [f"{number}/node/{rank}" for rank in range(self.settings.max_nodes)]
        return [rank for rank, text in enumerate(self._store.get_all(keys)) if text is not None]

    def _missing(self, number: int) -> list[int]:
        joined = self._joined(number)
        return [rank for rank in range(self.settings.max_nodes) if rank not in joined]

    def _lost(self, number: int) -> list[int]:
        """Return nodes of the last round without a heartbeat that have not joined this one."""
        lost = self._heartbeats.lost(member.node_rank for member in self.members)
        return [rank for rank in lost if self._store.get(f"{number}/node/{rank}") is None]

    def _without_lost(self) -> bool:
        """Return, on the head while workers run, whether to continue without nodes that were lost.

        Raises:
            PeerFailed: too few nodes are left.
        """
        lost = self._heartbeats.lost_rate_limited(member.node_rank for member in self.members)
        if not lost:
            return False
        settings = self.settings
        if len(self.members) - len(lost) >= settings.min_nodes:
            self._notice(f"{self._named(lost)} was lost; the others continue")
            return True
        record = failures.of_node(
            silence_message("its agent", settings.lost_after_s),
            kind="node_lost",
            node_rank=lost[0],
            node=settings.names[lost[0]] if settings.names else "",
            restart=self.round,
        )
        self.close_with(f"{self._named(lost)} was lost", record)
        raise PeerFailed(f"{self._named(lost)} was lost: {record.message}", record)

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(self.settings.name_of(rank) for rank in ranks)
