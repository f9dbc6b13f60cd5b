"""The pytest plugin: the marker `ranks`, the fixtures `rank` and `world_size`.

Every pytest run with dtrain installed loads this module. So it does not import torch, and it does
nothing unless a collected test requests ranks.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import pytest

from dtrain.testing import body, calls, client, report
from dtrain.testing.wire import Answer, Layout, Request

_verdicts = pytest.StashKey[report.Verdict]()

_OWN_PROCESS_ONLY = {
    "cache": "it writes files that ranks would fight over",
    "caplog": "a rank's log records go to its stderr, shown when the test fails",
    "capfd": "a rank's output is captured anyway and shown when the test fails",
    "capfdbinary": "a rank's output is captured anyway and shown when the test fails",
    "capsys": "use contextlib.redirect_stdout in the body",
    "capsysbinary": "use contextlib.redirect_stdout in the body",
    "monkeypatch": "use `with pytest.MonkeyPatch.context() as monkeypatch:` in the body",
    "pytester": "it starts pytest, which should not happen on every rank",
    "recwarn": "use pytest.warns or warnings.catch_warnings in the body",
    "request": "let a fixture take from it what the body needs",
}


@dataclass(frozen=True)
class _Marker:
    layout: Layout
    timeout_s: float
    init: bool


@dataclass(frozen=True)
class _Crash:
    """The location and the message, in the form of pytest's short summary."""

    path: str
    lineno: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.lineno}: {self.message}"


class _Shown:
    """The text of a failure, as the long part of a pytest report."""

    def __init__(self, verdict: report.Verdict, item: pytest.Item) -> None:
        path, line = verdict.where or (str(item.path), (item.location[1] or 0) + 1)
        self.reprcrash = _Crash(path, line, verdict.headline)
        self._text = verdict.text

    def toterminal(self, tw: Any) -> None:
        for line in self._text.splitlines():
            marked = line.startswith("E  ")
            tw.line(line, red=marked, bold=marked)

    def __str__(self) -> str:
        return self._text


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(world_size=None, *, nodes=1, ranks=None, timeout=60, init=True): run the body in "
        "world_size processes joined by gloo (default: the test's `world_size` argument), or in "
        "nodes x ranks; timeout in seconds; init=False leaves the process group to the body.",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fork the ranks' server before anything is computed here."""
    wanted = not session.config.option.collectonly and not session.testsfailed
    if not wanted or not any(_wants_ranks(item) for item in session.items):
        return (yield)
    items = {item.nodeid: item for item in session.items if isinstance(item, pytest.Function)}
    server = client.Server.fork(items)
    before = client.use_forked(server)
    try:
        return (yield)
    finally:
        client.use_forked(before)
        server.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse the marker where it would have no effect."""
    if item.get_closest_marker("ranks") is None:
        return
    kinds = {kind.__name__ for kind in type(item).__mro__}
    if not isinstance(item, pytest.Function) or "TestCaseFunction" in kinds:
        pytest.fail("only plain test functions and methods can have ranks", pytrace=False)
    import inspect

    if inspect.iscoroutinefunction(item.obj):
        pytest.fail("an async test cannot have ranks", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a marked test on its ranks."""
    mark = pyfuncitem.get_closest_marker("ranks")
    if mark is None:
        return None
    marker = _read_marker(mark, pyfuncitem)
    payload = body.pack(_pickle_funcargs(pyfuncitem))
    answer = client.current_server().run(
        Request(
            marker.layout, marker.timeout_s, marker.init, pyfuncitem.nodeid, payload, is_item=True
        )
    )
    _show_output(answer, pyfuncitem)
    verdict = report.judge(answer)
    if verdict is None:
        return True
    pyfuncitem.stash[_verdicts] = verdict
    # The rank's own exception, so that `xfail(raises=...)` works as it does without ranks.
    raise verdict.error or calls.RankError(verdict.text, verdict.rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what happened on the ranks instead of a traceback of this process."""
    made = yield
    verdict = item.stash.get(_verdicts, None)
    if call.when == "call" and verdict is not None:
        if isinstance(made.longrepr, tuple):  # a skip: location and reason
            path, line = verdict.where or (str(item.path), 0)
            made.longrepr = (path, line, f"Skipped: {verdict.headline}")
        elif made.longrepr is not None:
            shown: Any = _Shown(verdict, item)
            made.longrepr = shown
    return made


@pytest.fixture
def rank(request: pytest.FixtureRequest) -> object:
    """Return this rank's number, in the body of a test with the `ranks` marker."""
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail("the fixture `rank` needs @pytest.mark.ranks", pytrace=False)
    return body.OwnRank()


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """Return the number of ranks that run the body of a test with the `ranks` marker."""
    mark = request.node.get_closest_marker("ranks")
    if mark is None:
        pytest.fail("the fixture `world_size` needs @pytest.mark.ranks", pytrace=False)
    return _read_marker(mark, None).layout.world_size


def _wants_ranks(item: pytest.Item) -> bool:
    if item.get_closest_marker("ranks") is not None:
        return True
    used = (calls.run_ranks, sys.modules["dtrain.testing"])
    module = getattr(item, "module", None)
    return any(value is use for value in vars(module).values() for use in used) if module else False


def _read_marker(mark: pytest.Mark, item: pytest.Function | None) -> _Marker:
    """Read the marker's arguments, and fail the test if they are invalid."""
    try:
        return _bind_marker(item, *mark.args, **mark.kwargs)
    except (TypeError, ValueError) as error:
        message = str(error).replace("_bind_marker()", "it")
    pytest.fail(f"@pytest.mark.ranks: {message}", pytrace=False)


def _bind_marker(
    item: pytest.Function | None,
    world_size: int | None = None,
    *,
    nodes: int = 1,
    ranks: int | None = None,
    timeout: float = 60.0,
    init: bool = True,
) -> _Marker:
    if ranks is not None:
        if world_size is not None:
            raise ValueError("give the world size or `ranks` per node, not both")
        world_size = nodes * ranks
    if world_size is None and item is not None:
        world_size = cast("int | None", item.funcargs.get("world_size"))
    if world_size is None:
        raise ValueError(
            "the number of ranks is missing: write ranks(4) or ranks(nodes=2, ranks=2), or "
            "parametrize `world_size`"
        )
    return _Marker(Layout(world_size, nodes), float(timeout), init)


def _pickle_funcargs(item: pytest.Function) -> bytes:
    """Pickle the test's arguments. If one cannot be pickled, fail the test and name its fixture."""
    names = item._fixtureinfo.argnames
    for name in names:
        if name in _OWN_PROCESS_ONLY:
            pytest.fail(
                f"the fixture `{name}` works in pytest's own process only; the body runs in "
                f"ranks: {_OWN_PROCESS_ONLY[name]}",
                pytrace=False,
            )
    attributes = dict(vars(item.instance)) if item.instance is not None else None
    funcargs = {name: item.funcargs[name] for name in names}
    if body.why_not_picklable((funcargs, attributes)):
        for name, value in {**(attributes or {}), **funcargs}.items():
            if why := body.why_not_picklable(value):
                pytest.fail(
                    f"the value of `{name}`, a {type(value).__name__}, cannot be sent to the "
                    f"ranks: {why}. Create it in the body, from values of a fixture.",
                    pytrace=False,
                )
    return pickle.dumps((funcargs, attributes))


def _show_output(answer: Answer, item: pytest.Item) -> None:
    if item.config.option.capture == "no":
        report.echo(answer)
        return
    for result in answer.results:
        for key, text in (("stdout", result.stdout), ("stderr", result.stderr)):
            if text:
                item.add_report_section("call", f"{key} rank {result.rank}", text)
