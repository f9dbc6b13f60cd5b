"""Checkpoints at a real S3 server, over a network with faults, and the memory that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dtrain.errors import CheckpointError
from dtrain.ranks import RankInfo
from dtrain.run.remote import store as remote_store
from dtrain.run.remote.checkpoints import RemoteCheckpoints
from dtrain.run.remote.chunks import CHUNK, unfinished
from dtrain.run.remote.store import RemoteStore
from dtrain.run.rundir import RunDir
from dtrain.testing import run_ranks
from dtrain.train.checkpoint.content import contribution
from dtrain.train.checkpoint.directory import CheckpointDirectory
from dtrain.train.checkpoint.retention import Retention
from dtrain.train.checkpoint.store import CheckpointStore, Loaded
from support.checkpoints import save, store
from support.errors import raises
from support.growth import growth, in_use
from support.proxy import Fault, Proxy, Seen
from support.s3 import BUCKET, S3, with_bucket

LARGE = 150_000_000
MEMORY = 64_000_000
"""What a process may need for files of any size."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with with_bucket(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def url(server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a run of this test."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def proxy(url: str, server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    with Proxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def run_in(folder: Path, url: str) -> RunDir:
    run = RunDir(folder / "run-1")
    run.create()
    run.url_file.write_text(url)
    return run


def weights(num_bytes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(num_bytes // 8, generator=generator) for name in ("first", "second")}


KINDS: tuple[Fault, ...] = ("slow", "500", "cut-request", "cut-answer")
"""What the network does in the saves and loads of steps 1, 2, 3 and 4."""


class BadNetwork:
    """Faults for these steps."""

    def __init__(self) -> None:
        self._errors: Iterator[Fault | None] = cycle((None, None, "500", None, None, "503"))

    def __call__(self, request: Seen, times: int) -> Fault | None:
        kind = next((kind for n, kind in enumerate(KINDS, 1) if request.is_of(n)), None)
        if kind == "500":
            return next(self._errors)
        if kind in (None, "slow"):
            return kind
        is_chunk = request.method == "PUT" and request.chunk
        is_download = request.method == "GET" and request.path.endswith(".safetensors")
        once = is_chunk or request.completes or (is_download and not request.chunk)
        return kind if once and times == 0 else None


def saved_and_loaded(here: RunDir, elsewhere: list[RunDir]) -> list[list[bool]]:
    """Save in the background on one host, and load on another. Return what is the same."""
    ranks, expected = RankInfo.from_env(), weights(20_000_000)
    checkpoints = CheckpointStore(here, ranks, Retention(5), 0.25)
    same: list[list[bool]] = []

    def compare(loaded: Loaded) -> None:
        tensors = loaded.tensors["model"]
        same.append([torch.equal(tensors[name].read(), each) for name, each in expected.items()])
        assert loaded.progress == {"step": step}

    for step, there in enumerate(elsewhere, 1):
        state = {"model": expected}
        content = contribution(state, {}, {"step": step}, ranks.rank, ranks.world_size)
        assert checkpoints.save(step, content, {}, wait=False) is None
        assert checkpoints.finish() is not None
        CheckpointStore(there, ranks, Retention(5)).load_newest(compare)
        dist.barrier()
    checkpoints.close()
    return same


def test_checkpoints_survive_a_bad_network(proxy: Proxy, url: str, tmp_path: Path) -> None:
    proxy.fault = BadNetwork()
    here, *elsewhere = [run_in(tmp_path / str(number), url) for number in range(len(KINDS) + 1)]
    for same in run_ranks(saved_and_loaded, 2, here, elsewhere):
        assert same == [[True, True]] * len(KINDS)
    chunks = [request for request in proxy.seen if request.method == "PUT" and request.chunk]
    assert len(chunks) == len(KINDS) * 2 * -(-10_000_000 // CHUNK)
    # each that failed was repeated alone
    assert all(proxy.seen[chunk] == proxy.faults[chunk] + 1 for chunk in chunks)
    # and what was cut continued
    resumed = [request for request in proxy.seen if request.method == "GET" and request.chunk]
    assert [request.is_of(4) for request in resumed] == [True, True]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat twice what fails, at once."""
    monkeypatch.setattr(remote_store, "_PATIENT_S", (0.0, 0.0))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)


def listing_fails(number: int) -> Callable[[Seen, int], Fault | None]:
    """Answer one request that lists with an error, after `number` others."""
    kinds: Iterator[Fault | None] = chain([None] * number, ["500"], repeat(None))
    return lambda request, _: next(kinds) if request.lists else None


def test_a_listing_that_fails_does_not_hide_a_checkpoint(
    proxy: Proxy, impatient: None, url: str, tmp_path: Path
) -> None:
    """Whichever it is: fsspec's `glob` leaves out a directory if the fourth fails."""
    save(store(run_in(tmp_path, url)), 2, torch.ones(9))
    checkpoints = RemoteCheckpoints(run_in(tmp_path, url), url)
    for failing in range(5):
        proxy.fault = listing_fails(failing)
        assert [path.name for path in checkpoints.folders()] == ["step-00000002"]


def left(place: RemoteStore) -> tuple[list[str], int]:
    """Return the manifests, and the number of unfinished uploads."""
    return list(place.matching("*/manifest.json")), len(unfinished(place._fs, place._root))


def test_a_server_that_goes_away_for_good(
    proxy: Proxy, impatient: None, url: str, tmp_path: Path
) -> None:
    place = RemoteStore(f"{url}/checkpoints")
    is_away = False

    def fault(request: Seen, _: int) -> Fault | None:
        nonlocal is_away
        is_away = is_away or request.chunk == "2"
        return "away" if is_away else None

    proxy.fault = fault
    with raises("url.unreachable", "step-00000002", url, kind=CheckpointError):
        save(store(run_in(tmp_path / "a", url)), 2, weights(10_000_000))
    proxy.fault = lambda *_: None
    assert left(place) == ([], 1)  # it could not be aborted
    assert store(run_in(tmp_path / "b", url)).load_newest(lambda _: None) is None
    assert left(place) == ([], 0)  # but the next attempt does it


def test_a_chunk_that_is_always_refused(
    proxy: Proxy, impatient: None, url: str, tmp_path: Path
) -> None:
    proxy.fault = lambda request, _: "500" if request.chunk == "2" else None
    with raises("url.unreachable", "step-00000002", url, kind=CheckpointError):
        save(store(run_in(tmp_path, url)), 2, weights(20_000_000))
    times = {request.chunk: times for request, times in proxy.seen.items() if request.chunk}
    assert times.pop("2") == 3
    assert set(times.values()) == {1}
    assert left(RemoteStore(f"{url}/checkpoints")) == ([], 0)


def test_an_upload_whose_last_answer_is_lost(
    proxy: Proxy, impatient: None, url: str, tmp_path: Path
) -> None:
    """Some servers then report that there is no such upload."""
    lost: list[Fault] = ["cut-answer", "404"]
    proxy.fault = lambda request, _: lost.pop(0) if request.completes and lost else None
    (tmp_path / "file").write_bytes(bytes(2 * CHUNK))
    place = RemoteStore(f"{url}/checkpoints", patient=True)
    place.put(tmp_path / "file", "file")
    assert not lost
    assert place.files()["file"]["size"] == 2 * CHUNK


def fetched(folder: Path, url: str) -> tuple[int, int]:
    """Download the newest checkpoint. Return its bytes, and by how many memory grew."""
    run = run_in(folder, url)
    directory = CheckpointDirectory(run, Retention(5))
    newest, *_ = directory.newest_first()
    grown = growth(lambda: directory.fetch(newest))
    return sum(path.stat().st_size for path in newest.iterdir()), grown


def test_files_of_any_size_need_little_memory(url: str, tmp_path: Path) -> None:
    checkpoints = CheckpointStore(run_in(tmp_path / "a", url), RankInfo(), Retention(5), 0.25)
    most = []
    for step, size in enumerate((9_000_000, LARGE), start=1):
        content = contribution({"model": weights(size)}, {}, {"step": step}, 0, 1)
        assert checkpoints.save(step, content, {}, wait=False) is None
        assert checkpoints.finish() is not None
        assert checkpoints._writer is not None
        pid = checkpoints._writer._process.pid
        most.append(in_use("VmHWM", pid) - content.image.bytes)  # the copy, which ranks share
    checkpoints.close()
    assert most[1] - most[0] < MEMORY
    ((size, grown),) = run_ranks(fetched, 1, tmp_path / "b", url)
    assert size > LARGE
    assert grown < MEMORY
