import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import JobError, Problem
from dtrain.job.load import LoadedJob, flag, load_job
from dtrain.job.spec import JobSpec
from dtrain.job.yaml_reader import dump_yaml, in_file, read_yaml
from support.errors import assert_problems, place_of

UNKNOWN, INVALID = "job.unknown-field", "job.invalid-value"
TYPE, RANGE = "job.wrong-type", "job.out-of-range"
MICRO = "6:21: train.micro_batch_size"
PRECISIONS = "fp32, bf16, fp16"
EVERY_STEPS = ("eval", "checkpoint", "log")
"""The sections with a field `every_steps`."""
HEAD = "name: digits\ntask: task.py:Digits\ntrain:\n  epochs: 1\n  global_batch_size: 8\n"
Load = Callable[..., LoadedJob]
Wrong = Callable[..., Sequence[Problem]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "task.py").write_text("class Digits:\n    def __init__(self, **args): ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Load:
    def load(text: str | bytes, *overrides: str, **rest: Any) -> LoadedJob:
        (folder / "job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_job("job.yaml", overrides, **rest)

    return load


@pytest.fixture
def wrong(load: Load) -> Wrong:
    def wrong(text: str | bytes, *overrides: str, **rest: Any) -> Sequence[Problem]:
        with pytest.raises(JobError) as caught:
            load(text, *overrides, **rest)
        return caught.value.problems

    return wrong


# -- what is read ------------------------------------------------------------------------------


def test_units_and_numbers_as_people_write_them(load: Load) -> None:
    spec = load(
        HEAD
        + "  clip_grad_norm: 1e-3\n  steps: 1e4\n"
        + "args: {lr: 1e-3, many: 1_000, date: 2026-11-22, ratio: 1:30, code: 010, hex: 0x10}\n"
        + "checkpoint: {every: 30m}\n"
        + "launch: {nodes: 2:4, join_timeout: 1:30:00, stop_timeout: 90}\n"
    ).spec
    assert spec.args == {
        "lr": 0.001,
        "many": 1000,
        "date": "2026-11-22",
        "ratio": "1:30",
        "code": "010",
        "hex": 16,
    }
    assert (spec.train.clip_grad_norm, spec.train.steps) == (0.001, 10_000)
    assert spec.checkpoint.every == 1800
    assert spec.launch.nodes == (2, 4)
    assert (spec.launch.join_timeout, spec.launch.stop_timeout) == (5400, 90)


def test_variables_stay_letter_by_letter(load: Load) -> None:
    spec = load(
        HEAD + "launch:\n  env: {A: 010, B: 1e-3, C: 7, D: 'yes'}\n", "launch.env.E=0x1f"
    ).spec
    assert spec.launch.env == {"A": "010", "B": "1e-3", "C": "7", "D": "yes", "E": "0x1f"}


def test_an_empty_section_is_an_empty_section(load: Load) -> None:
    text = HEAD + "eval:\n  # every_steps: 5\nargs:\nlaunch:\n  env:\n  nodes: 2\n"
    spec = load(text, profile_launch={"max_restarts": flag("p", 3)}).spec
    assert spec.eval.every_steps is None
    assert (spec.args, spec.launch.env, spec.launch.max_restarts) == ({}, {}, 3)


def test_anchors_and_merge_keys(load: Load) -> None:
    job = load(HEAD + "args:\n  a: &a {x: 1, y: 2}\n  b: {<<: *a, y: 3}\n  c: *a\n")
    assert job.spec.args == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert job.sources["args.b.x"] == "job.yaml:7"


def test_the_text_is_kept_as_given(load: Load) -> None:
    text = "# my job\r\n" + HEAD + "# end"
    assert load(text).text == text


# -- precedence and sources --------------------------------------------------------------------


def test_flag_over_set_over_job_over_profile_over_default(load: Load) -> None:
    profile = {
        "nodes": flag("site.yaml", 9),
        "max_restarts": flag("site.yaml", 5),
        "env": flag("site.yaml", {"A": "site", "B": "site"}),
    }
    job = load(
        HEAD + "launch:\n  nodes: 2\n  procs_per_node: 2\n  env: {A: job}\n",
        "launch.procs_per_node=3",
        "train.epochs=7",
        "args.opt.betas=[0.9, 0.99]",
        profile_launch=profile,
        flags={"launch.nodes": flag("--nodes", "3:4"), "launch.env.C": flag("--env C", "flag")},
    )
    assert job.spec.launch.nodes == (3, 4)
    assert job.spec.launch.env == {"A": "job", "B": "site", "C": "flag"}
    assert job.spec.args == {"opt": {"betas": [0.9, 0.99]}}
    expected = {
        "name": "job.yaml:1",
        "train.epochs": "--set train.epochs=7",
        "train.global_batch_size": "job.yaml:5",
        "train.early_stopping": "default",
        "args.opt.betas": "--set args.opt.betas=[0.9, 0.99]",
        "launch.nodes": "--nodes",
        "launch.procs_per_node": "--set launch.procs_per_node=3",
        "launch.max_restarts": "site.yaml",
        "launch.join_timeout": "default",
        "launch.env.A": "job.yaml:9",
        "launch.env.B": "site.yaml",
        "launch.env.C": "--env C",
        "launch.preload": "default",
    }
    assert {field: job.sources[field] for field in expected} == expected


@pytest.mark.parametrize(
    "override",
    [
        "launch.env.API_KEY=hunter2",
        "launch.env={API_KEY: hunter2}",
        "launch={env: {API_KEY: hunter2}}",
        "args.api_key=hunter2",
        "args={db: {password: hunter2}}",
        "args.db=pg://me:hunter2@host/x",
    ],
)
def test_a_secret_is_not_in_its_source(load: Load, override: str) -> None:
    job = load(HEAD, override)
    assert "hunter2" in str((job.spec.launch.env, job.spec.args))
    assert "hunter2" not in str(job.sources)


@pytest.mark.parametrize(
    "override",
    [
        "launch.env={MY_TOKEN: hunter2",  # no YAML
        "launch.env=MY_TOKEN=hunter2",
        "launch.env={MY_TOKEN: [hunter2]}",
        "launchs.env={MY_TOKEN: hunter2}",
        "train.epochs=pg://me:hunter2@host/x",
    ],
)
def test_a_secret_is_not_in_an_error(wrong: Wrong, override: str) -> None:
    shown = "\n".join(str(problem) for problem in wrong(HEAD, override))
    assert f"--set {override.partition('=')[0]}" in shown
    assert "hunter2" not in shown


def test_every_leaf_has_a_source(load: Load) -> None:
    sources = load(HEAD).sources

    def leaves(value: Any, above: str = "") -> set[str]:
        if not isinstance(value, dict) or not value:
            return {above.rstrip(".")}
        return {leaf for name in value for leaf in leaves(value[name], f"{above}{name}.")}

    spec = load(HEAD).spec
    assert set(sources) == leaves(spec.to_plain())


# -- problems, one by one ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "code", "place", "names"),
    [
        ("epochs: 3", UNKNOWN, "6:1: epochs", ["under train"]),
        ("every_steps: 3", UNKNOWN, "6:1: every_steps", [f"under {each}" for each in EVERY_STEPS]),
        ("  global_batchsize: 3", UNKNOWN, "6:3: train.global_batchsize", ["'global_batch_size'"]),
        ("  batch_size: 3", UNKNOWN, "6:3: train.batch_size", ["train.global_batch_size"]),
        ("  max-epochs: 3", UNKNOWN, "6:3: train.max-epochs", ["'epochs'"]),
        ("launch: {gpus: 3}", UNKNOWN, "6:10: launch.gpus", ["'gpus_per_node'"]),
        ("launch: {procs: 3}", UNKNOWN, "6:10: launch.procs", ["'procs_per_node'"]),
        ("gpus: 3", UNKNOWN, "6:1: gpus", ["'gpus_per_node'", "under launch"]),
        ("num_workers: 3", UNKNOWN, "6:1: num_workers", ["'workers'", "under data"]),
        ("log: {zzz: 1}", UNKNOWN, "6:7: log.zzz", ["log has: every_steps, loggers"]),
        ("  precision: FP61", INVALID, "6:14: train.precision", [PRECISIONS, "'FP61'", "'fp16'"]),
        ("  precision: 16", INVALID, "6:14: train.precision", [PRECISIONS, "number 16"]),
        ("  micro_batch_size: yes", TYPE, MICRO, ["whole number", "yes", "true"]),
        ("  micro_batch_size: 2.5", TYPE, MICRO, ["whole number", "number 2.5"]),
        ("  micro_batch_size: '2'", TYPE, MICRO, ["whole number", "text '2'"]),
        ("  micro_batch_size: 0", RANGE, MICRO, ["at least 1", "number 0"]),
        ("  micro_batch_size: 9", "job.micro-batch-too-large", MICRO,
         ["9", "global_batch_size, 8"]),
        ("  clip_grad_norm: 0", RANGE, "6:19: train.clip_grad_norm", ["more than 0", "number 0"]),
        ("  early_stopping: {}", "job.no-evaluation-to-stop-by", "6:3: train.early_stopping",
         ["eval.every_steps", "eval.every_epochs"]),
        ("seed: -1", RANGE, "6:7: seed", ["at least 0", "number -1"]),
        ("data: {shuffle: 1}", TYPE, "6:17: data.shuffle", ["true or false", "number 1"]),
        ("data: {pin_memory: atuo}", TYPE, "6:20: data.pin_memory",
         ["true, false, auto", "'atuo'", "'auto'"]),
        ("data: 3", TYPE, "6:7: data", ["section", "number 3"]),
        ("data: {workers: }", TYPE, "6:16: data.workers", ["whole number", "nothing"]),
        ("args: [1]", TYPE, "6:7: args", ["section", "found a list"]),
        ("launch: {preload: torch}", TYPE, "6:19: launch.preload", ["expected a list", "'torch'"]),
        ("launch: {preload: [a, 3]}", TYPE, "6:23: launch.preload[1]", ["number 3", '"3"']),
        ("launch: {nodes: 4:2}", INVALID, "6:17: launch.nodes", ["4:2", "min:max"]),
        ("launch: {nodes: 0:2}", RANGE, "6:17: launch.nodes", ["at least 1", "'0:2'"]),
        ("launch: {join_timeout: 3 fortnights}", INVALID, "6:24: launch.join_timeout",
         ["90s, 30m, 2h, 1d, 1h30m, 01:30:00", "'3 fortnights'"]),
        ("launch: {env: {A: on}}", TYPE, "6:19: launch.env.A", ["found on", "true", '"on"']),
        ("name: again", "yaml.duplicate-key", "6:1", ["'name'", "line 1"]),
        ("3: x", "yaml.key-not-text", "6:1", ['"3"']),
        ("on: x", "yaml.key-not-text", "6:1", ["boolean", '"on"']),
        ("[a, b]: x", "yaml.key-not-text", "6:1", ["one word"]),
        ("args: {a: !!python/name:os.system x}", "yaml.value-unsupported", "6:11",
         ["!!python/name:os.system"]),
        ("args: {a: !mine {b: 1}}", "yaml.value-unsupported", "6:11", ["!mine"]),
        ("args: {a: !!int x}", "yaml.value-unsupported", "6:11", ["!!int"]),
        ("args: {<<: 3}", "yaml.merge-without-section", "6:12", ["`<<`"]),
    ],
)  # fmt: skip
def test_a_problem_and_its_place(
    wrong: Wrong, extra: str, code: str, place: str, names: list[str]
) -> None:
    assert_problems(wrong(HEAD + extra + "\n"), (code, f"job.yaml:{place}", *names))


@pytest.mark.parametrize(
    ("text", "code", "place", "names"),
    [
        ("", "yaml.empty", "", ["name, task, train"]),
        ("# nothing\n", "yaml.empty", "", ["name, task, train"]),
        ("- a\n", "yaml.not-a-section", ":1:1", ["a list"]),
        ("digits\n", "yaml.not-a-section", ":1:1", ["one value"]),
        ("name: a\n\ttask: b\n", "yaml.syntax", ":2:1", ["a tab"]),
        ("name: a: b\n", "yaml.syntax", ":1:8", ["`:`"]),
        ("train:\n    a: 1\n  b: 2\n", "yaml.syntax", ":3:3", ["indentation"]),
        ("name: 'a\n", "yaml.syntax", ":1:7", ["quotes"]),
        ("a: [1, 2\nb: 3\n", "yaml.syntax", ":2:2", ["bracket"]),
        ("a: 1\n---\nb: 2\n", "yaml.syntax", ":2:1", ["`---`"]),
        ("name: *who\n", "yaml.syntax", ":1:7", ["undefined alias 'who'"]),
        ("a: &x [*x]\n", "yaml.too-deep", ":1:1", []),
        ("[" * 1500, "yaml.too-deep", ":1:1", []),
        ("name: a\x00b\n", "yaml.syntax", ":1:8", ["'\\x00'"]),
        (b"name: a\ntask: caf\xe9\n", "file.not-utf8", ":2:10", ["0xe9"]),
    ],
)
def test_what_is_no_yaml(
    wrong: Wrong, text: str | bytes, code: str, place: str, names: list[str]
) -> None:
    assert_problems(wrong(text), (code, f"job.yaml{place}", *names))


def test_utf8_with_a_byte_order_mark_is_fine(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + HEAD.encode()).spec.name == "digits"


def test_missing_fields_point_at_their_section(wrong: Wrong) -> None:
    assert_problems(
        wrong("seed: 1\ntrain:\n  epochs: 1\n"),
        ("job.missing-field", "job.yaml:1:1: name", "`runs/<name>-<id>`"),
        ("job.missing-field", "job.yaml:1:1: task", "`file.py:Class`", "`package.module:Class`"),
        ("job.missing-field", "job.yaml:2:1: train.global_batch_size"),
    )
    assert_problems(
        wrong(HEAD.replace("  epochs: 1\n", "")),
        ("job.endless-training", "job.yaml:3:1: train", "epochs", "steps"),
    )


def test_a_misspelt_key_is_one_problem_not_two(wrong: Wrong) -> None:
    assert_problems(
        wrong(HEAD.replace("train:", "trian:")), (UNKNOWN, "job.yaml:3:1: trian", "'train'")
    )
    assert_problems(
        wrong(HEAD.replace("epochs", "epoch").replace("global_batch", "globl_batch")),
        (UNKNOWN, "job.yaml:4:3: train.epoch", "'epochs'"),
        (UNKNOWN, "job.yaml:5:3: train.globl_batch_size", "'global_batch_size'"),
    )


def test_all_problems_at_once_sorted_by_place(wrong: Wrong) -> None:
    text = "name: no\ntask: task.py:Digit\ntrain:\n  epochs: 1\n  global_batch_size: x\nlr: 1\n"
    problems = wrong(
        text,
        "train.epochs",
        "train.precision=bf61",
        "args.q=[1",
        flags={"launch.nodes": flag("--nodes", "many")},
    )
    assert [place_of(problem).partition(": ")[0] for problem in problems] == [
        "job.yaml:1:7",
        "job.yaml:2:7",
        "job.yaml:5:22",
        "job.yaml:6:1",
        "--nodes",
        "--set args.q=[1",
        "--set train.epochs",
        "--set train.precision=bf61",
    ]


def test_set_goes_through_the_same_checks(wrong: Wrong) -> None:
    place = "--set train.lr=0.1: train.lr"
    assert_problems(wrong(HEAD + "args: {lr: 1}\n", "train.lr=0.1"), (UNKNOWN, place, "args.lr"))
    assert_problems(wrong(HEAD, "train.lr=0.1"), (UNKNOWN, place, "train has: epochs, steps"))
    assert_problems(
        wrong(HEAD, "name=yes"), (TYPE, "--set name=yes: name", "found yes", "true", '"yes"')
    )
    for text in ("train.epochs", "=3", "train..epochs=3", ""):
        expected = ("usage.set-syntax", f"--set {text}", "FIELD=VALUE")
        assert_problems(wrong(HEAD, text), expected)


def test_a_missing_file_and_a_directory(folder: Path) -> None:
    (folder / "job.yaml").write_text(HEAD)
    cases = {
        "jbo.yaml": ("file.not-found", "'job.yaml'"),
        "nowhere/job.yaml": ("file.not-found",),
        ".": ("file.is-a-directory",),
        "job.yaml/x": ("file.unreadable", "Not a directory"),
    }
    for path, (code, *names) in cases.items():
        with pytest.raises(JobError) as caught:
            load_job(path)
        assert_problems(caught.value.problems, (code, path, *names))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["with space", "quo'te\"", "semi;colon", "new\nline", "ünï"])
def test_hostile_directories(folder: Path, name: str) -> None:
    inner = folder / name
    inner.mkdir()
    (inner / "ta sk;.py").write_text("class Digits: pass\n")
    (inner / "job.yaml").write_text(HEAD.replace("task.py:Digits", "'ta sk;.py:Digits'"))
    job = load_job(inner / "job.yaml", job_dir=inner)
    assert "\n" not in job.sources["name"]
    (inner / "job.yaml").write_text("name: a\n")
    with pytest.raises(JobError) as caught:
        load_job(inner / "job.yaml")
    assert all("\n" not in str(problem) for problem in caught.value.problems)


# -- the spec alone ---------------------------------------------------------------------------


def test_a_spec_survives_being_written_and_read(load: Load, folder: Path) -> None:
    text = HEAD + "args: {lr: '1e-3', d: 1e-7}\nlaunch: {nodes: 2:4, env: {A: 1e-3}}\n"
    spec = load(text, "train.early_stopping.patience=2", "eval.every_steps=5").spec
    written = dump_yaml(spec.model_dump(mode="json"))
    assert JobSpec.model_validate(yaml.safe_load(written)) == spec
    (folder / "resolved.yaml").write_text(written)
    assert load_job("resolved.yaml").spec == spec


def test_a_spec_made_in_python_is_checked_between_fields_too() -> None:
    good = {"name": "a", "task": "t.py:T", "train": {"epochs": 1, "global_batch_size": 4}}
    assert JobSpec.model_validate(good).train.epochs == 1
    with pytest.raises(ValueError, match="epochs or steps"):
        JobSpec.model_validate({**good, "train": {"global_batch_size": 4}})


def test_the_launch_plane_does_not_import_torch(folder: Path) -> None:
    (folder / "task.py").write_text("import torch\nclass Digits(torch.nn.Module): pass\n")
    (folder / "job.yaml").write_text(HEAD)
    code = (
        "import sys; from dtrain.job.load import load_job; load_job('job.yaml');"
        "import dtrain.job.schema; sys.exit('torch' in sys.modules or 'task' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_plain_data_survives_dump_and_read(data: Any) -> None:
    written, problems = read_yaml(dump_yaml(data), in_file("f"))
    assert problems == []
    assert (written.plain() if written else None) == data


@given(st.text(alphabet="ab:- \n\t#'\"[]{},&*!|>%@`0123e.\\\x85", max_size=30))
def test_any_text_is_read_or_refused_with_a_place(text: str) -> None:
    written, problems = read_yaml(text, in_file("f"))
    for problem in problems:
        assert problem.line is not None
        assert 1 <= problem.line <= text.count("\n") + text.count("\x85") + 2
        assert problem.column is not None
    assert written is None or written.plain() is None or not problems or written.place.line
