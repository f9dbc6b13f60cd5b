import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain import catalog
from dtrain.errors import JobError, Problem
from dtrain.job.load import flag, load_job
from dtrain.job.script import does_nothing
from dtrain.job.spec import cross_problems
from dtrain.job.static_source import Arguments, Source
from dtrain.task import REQUIRED
from support.errors import assert_problems, raises

JOB = "name: digits\ntask: {task}\ntrain:\n  epochs: 1\n  global_batch_size: 8\n"
Check = Callable[..., Sequence[Problem]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.chdir(tmp_path)

    def check(task: str = "task.py:Digits", extra: str = "", **flags: object) -> Sequence[Problem]:
        (tmp_path / "job.yaml").write_text(JOB.format(task=task) + extra)
        given = {f"launch.{name}": flag(f"--{name}", value) for name, value in flags.items()}
        try:
            load_job("job.yaml", flags=given)
        except JobError as error:
            return error.problems
        return []

    (tmp_path / "task.py").write_text("class Digits: pass\nclass Letters: pass\n")
    return check


# -- trainer, strategy, paths ------------------------------------------------------------------


def test_unknown_names(check: Check) -> None:
    strategies, trainers = (", ".join(catalog.names(kind)) for kind in ("strategy", "trainer"))
    assert_problems(
        check(extra="strategy: ddpp\ntrainer: nativ\n"),
        ("job.unknown-name", "job.yaml:6:11: strategy", strategies, "'ddp'"),
        ("job.unknown-name", "job.yaml:7:10: trainer", trainers, "'native'"),
    )


def test_pairs_that_cannot_work(check: Check) -> None:
    place = "job.yaml:6:11: strategy"
    expected = ("plan.unsupported-combination", place, "'single'", "2", "'ddp'", "--nodes 1")
    assert_problems(check(extra="strategy: single\nlaunch: {nodes: 1:2}\n"), expected)
    assert_problems(check(extra="strategy: single\n", nodes="2"), expected)
    assert check(extra="strategy: single\nlaunch: {nodes: 2}\n", nodes=1) == []
    assert_problems(
        check(extra="strategy: single\nlaunch: {nodes: many}\n"),
        ("job.invalid-value", "job.yaml:7:17: launch.nodes", "'many'"),
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"train": {"compile": True}}, []),
        ({"strategy": "fsdp", "fsdp": {"param_dtype": "bf16"}}, []),
        ({"fsdp": {"replicas": 1, "cpu_offload": False}}, []),  # the defaults
        ({"strategy": "exact", "train": {"compile": True}},
         [("train.compile", "plan.unsupported-combination", "single, ddp, fsdp")]),
        ({"strategy": "dp", "train": {"compile": True}},
         [("train.compile", "plan.unsupported-combination", "'dp'")]),
        ({"fsdp": {"replicas": 2, "reshard_after_forward": False}},
         [(f"fsdp.{name}", "job.field-without-effect", "strategy fsdp")
          for name in ("replicas", "reshard_after_forward")]),
        ({"strategy": "fsdp", "fsdp": {"param_dtype": "bf16"}, "train": {"precision": "bf16"}},
         [("fsdp.param_dtype", "job.two-precisions", "train.precision: bf16")]),
        ({"trainer": "lightning", "lightning": {"step": "lightning"}, "train": {"compile": True}},
         [("train.compile", "plan.unsupported-combination", "configure_model()")]),
    ],
)  # fmt: skip
def test_settings_that_a_strategy_does_not_have(
    fields: dict[str, Any], expected: list[tuple[str, str, str]]
) -> None:
    train = {"steps": 2, "global_batch_size": 4, **fields.get("train", {})}
    found = cross_problems({"name": "t", "task": "t:T", **fields, "train": train})
    assert [(".".join(keys), code) for keys, _, code in found] == [each[:2] for each in expected]
    for (_, text, _), (_, _, word) in zip(found, expected, strict=True):
        assert word in text


def test_paths_must_exist(check: Check, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits.csv").touch()
    extra = f"data:\n  paths:\n  - data\n  - data/digit.csv\n  - {tmp_path}/data\n  - ../x\n"
    assert_problems(
        check(extra=extra),
        ("job.data-not-found", "job.yaml:9:5: data.paths[1]", "data/digit.csv", "'digits.csv'"),
        ("job.data-not-found", "job.yaml:11:5: data.paths[3]", "../x"),
    )


# -- the task's file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "code", "names"),
    [
        ("tsak.py:Digits", "job.code-not-found", ["tsak.py", "'task.py'"]),
        ("task.py:Digit", "job.class-not-found", ["task.py", "'Digit'", "Digits, Letters",
         "'Digits'"]),
        ("task.py", "job.reference-syntax", ["task.py:Class", "'task.py'"]),
        ("'task.py:'", "job.reference-syntax", ["task.py:Class", "'task.py:'"]),
        ("Digits", "job.reference-syntax", ["file.py:Class", "'Digits'"]),
        ("':Digits'", "job.reference-syntax", ["file.py:Class", "':Digits'"]),
        ("folder.py:Digits", "job.code-not-found", ["folder.py"]),
        ("no.such.module:Digits", "job.code-not-found", ["no.such.module"]),
        ("package.sub:Digit", "job.class-not-found", ["package/sub.py", "'Digit'", "'Digits'"]),
        ("package.nosuch:Digits", "job.code-not-found", ["package.nosuch"]),
        ("os.path.x:Digits", "job.code-not-found", ["os.path.x"]),
    ],
)  # fmt: skip
def test_a_task_that_is_not_there(
    check: Check, tmp_path: Path, task: str, code: str, names: list[str]
) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise SystemExit('this ran')\n")
    (tmp_path / "package" / "sub.py").write_text("class Digits: pass\n")
    assert_problems(check(task), (code, "job.yaml:2:7: task", *names))


@pytest.mark.parametrize(
    "text",
    [
        "class Digits: pass",
        "def Digits(): pass",
        "Digits = make()",
        "Digits: type = make()",
        "A, (Digits, C) = make()",
        "from elsewhere import Digits",
        "from elsewhere import Letters as Digits",
        "import elsewhere as Digits",
        "from elsewhere import *",
        "def __getattr__(name): ...",
        "try:\n    import x\nexcept ImportError:\n    class Digits: pass",
        "if True:\n    pass\nelse:\n    class Digits: pass",
    ],
)
def test_ways_to_have_the_class(check: Check, tmp_path: Path, text: str) -> None:
    (tmp_path / "task.py").write_text(text + "\n")
    assert check() == []


@pytest.mark.parametrize("text", ["def f():\n    class Digits: pass", "Digits: int", "'\\d'"])
def test_ways_not_to_have_it(check: Check, tmp_path: Path, text: str) -> None:
    (tmp_path / "task.py").write_text(text + "\n")
    assert_problems(check(), ("job.class-not-found", "job.yaml:2:7: task", "task.py", "'Digits'"))


def test_a_syntax_error_is_reported_at_its_own_place(check: Check, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("x = 1\nclass Digits(:\n")
    assert_problems(check(), ("job.not-python", "task.py:2:14", "invalid syntax"))
    for raw in (b"x = '\xff'\n", b"x = 1\x00\n"):
        (tmp_path / "task.py").write_bytes(raw)
        (problem,) = check()
        assert (problem.code, problem.file) == ("job.not-python", "task.py")


def test_a_relative_import_is_reported_at_its_own_place(check: Check, tmp_path: Path) -> None:
    imports = "import os\nfrom . import a, b as c\nfrom .models import (\n  Net,\n  Other,\n)\n"
    text = f"{imports}from ..up import d\nclass Digits: pass"
    (tmp_path / "task.py").write_text(text)
    assert_problems(
        check(),
        ("job.relative-import", "task.py:2:1", "`import a, b as c`"),
        ("job.relative-import", "task.py:3:1", "`from models import Net, Other`"),
        ("job.relative-import", "task.py:7:1", "`task: package.module:Class`"),
    )
    for name in ("package", "package/__init__.py", "package/task.py"):
        path = tmp_path / name
        path.write_text(text) if path.suffix else path.mkdir()
    assert check("package.task:Digits") == []
    for works in (
        "__package__ = 'package'\n",
        "try:\n    from . import a\nexcept ImportError: a = 0\n",
    ):
        rest = imports if "__package__" in works else ""
        (tmp_path / "task.py").write_text(f"{works}{rest}class Digits: pass")
        assert check() == []


def test_modules_are_found_without_running_any(check: Check, tmp_path: Path) -> None:
    for name in ("mine", "mine/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('this ran')\n")
    (tmp_path / "mine" / "inner" / "sub.py").write_text("class Digits: pass\n")
    (tmp_path / "bare").mkdir()  # a namespace package: no __init__.py
    (tmp_path / "bare" / "sub.py").write_text("class Digits: pass\n")
    for task in ("mine.inner.sub:Digits", "bare.sub:Digits", "json.decoder:JSONDecoder"):
        assert check(task) == []
    assert "mine" not in sys.modules


def test_nothing_of_the_users_is_imported(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("import torch\nopen('ran', 'w')\nclass Digits: pass\n")
    (tmp_path / "job.yaml").write_text(JOB.format(task="task:Digits"))
    code = (
        "import sys; from dtrain.job.load import load_job; load_job('job.yaml');"
        "sys.exit(bool({'torch', 'task'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
    assert not (tmp_path / "ran").exists()


# -- arguments ---------------------------------------------------------------------------------


def test_unknown_and_missing_arguments(check: Check, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "class Digits:\n    def __init__(self, lr, width=64, *, depth, seed=0): ...\n"
    )
    takes = "lr, depth, width, seed"
    assert_problems(
        check(extra="args: {widht: 3, depth: 1}\n"),
        ("job.missing-argument", "job.yaml:6:1: args.lr", "Digits"),
        ("job.unknown-argument", "job.yaml:6:8: args.widht", "Digits", takes, "'width'"),
    )
    assert_problems(
        check(),
        ("job.missing-argument", "job.yaml:2:7: args.depth", "Digits"),
        ("job.missing-argument", "job.yaml:2:7: args.lr", "Digits"),
    )
    assert check(extra="args: {lr: 1, depth: 1, seed: 2}\n") == []


def test_a_class_without_arguments(check: Check, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("from dtrain import Task\nclass Digits(Task): pass\n")
    assert_problems(
        check(extra="args: {lr: 3}\n"),
        ("job.unknown-argument", "job.yaml:6:8: args.lr", "Digits", "none"),
    )


TASK = "from dtrain import Task\n{0}class Digits({1}):\n    def model(self): ...\n{2}"
REST = "".join(f"    def {name}(self, *args): ...\n" for name in REQUIRED[1:])


@pytest.mark.parametrize(
    ("above", "bases", "body", "missing"),
    [
        ("", "Task", REST, ""),
        ("", "Task", "    loss = optimizer = train_dataset = model\n", ""),
        ("", "Task", REST.replace("def loss", "def los"), "loss()"),
        ("", "", "    def loss(self): ...\n", "train_dataset() and optimizer()"),
        (f"class Base(Task):\n{REST}", "Base", "", ""),
        ("class Base(Task):\n    pass\n", "Base", "", "train_dataset() and loss() and optimizer()"),
        ("from elsewhere import Base\n", "Base", "", ""),
        ("", "Task", "    def __getattr__(self, name): ...\n", ""),
        ("", "Task", "    def __init__(self): setattr(self, 'loss', 1)\n", ""),
        ("def wrap(c): return c\n@wrap\n", "Task", "", ""),
        ("", "Task", f"    if True:\n    {REST.replace('    def', '        def', 3)[4:]}", ""),
    ],
)
def test_a_task_without_a_method_that_all_have(
    check: Check, tmp_path: Path, above: str, bases: str, body: str, missing: str
) -> None:
    text = TASK.format(above, bases, body)
    (tmp_path / "task.py").write_text(text)
    line = text[: text.index("class Digits")].count("\n") + 1
    needs = ", ".join(REQUIRED)
    expected = ("job.task-incomplete", f"task.py:{line}:1", f"Digits has no {missing};", needs)
    assert_problems(check(), *([expected] if missing else []))


# -- variables ---------------------------------------------------------------------------------


def test_names_of_variables(check: Check) -> None:
    extra = "launch:\n  env:\n    A: 1\n    A=B: 2\n    '': 3\n"
    assert_problems(
        check(extra=extra),
        ("job.invalid-value", "job.yaml:9:10: launch.env.A=B", "`=`", "'A=B'"),
        ("job.invalid-value", "job.yaml:10:9: launch.env.", "`=`", "''"),
    )
    for field in ("launch.env.", "launch.env.A=B"):
        with raises("job.invalid-value", "--env x: ", "''" if field.endswith(".") else "'A=B'"):
            load_job("job.yaml", flags={field: flag("--env x", "1")})
    check()
    given = {"launch.env.A.B": flag("--env A.B", "1")}
    job = load_job("job.yaml", ["launch.env.C.D=2"], flags=given)
    assert job.spec.launch.env == {"A.B": "1", "C.D": "2"}


FIELDS = """\
import dataclasses
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar
from dtrain.task import Task
@dataclass
class Base(Task):
    lr: float
    width: int = 64
    total: ClassVar[int] = 3
    hidden: int = field(init=False, default=3)
@dataclasses.dataclass(frozen=True)
class Digits(Base):
    width: int = 32
    _: KW_ONLY
    names: list = field(default_factory=list)
    depth: int
    kept: int = dataclasses.field(repr=False)
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class A:\n def __init__(self, a, b=1, **rest): ...", Arguments(("a",), ("b",), True)),
        ("class A:\n def __init__(self, *rest, c=None, d): ...", Arguments(("d",), ("c",))),
        ("class A:\n def __init__(*all): ...", None),
        ("class A:\n def __init__(self, a, /, b): ...", None),
        ("class A:\n @wrapped\n def __init__(self): ...", None),
        ("class A:\n def __new__(cls, a): ...", None),
        ("@registered\nclass A: ...", None),
        ("class A(metaclass=M): ...", None),
        ("class A(Unknown): ...", None),
        ("class A(A): ...", None),
        ("from torch import nn\nclass A(nn.Module): ...", None),
        ("import abc\nclass A(abc.ABC): ...", Arguments()),
        ("from typing import Generic, T\nclass A(Generic[T]): ...", Arguments()),
        ("import dtrain\nclass A(dtrain.Task): ...", Arguments()),
        ("class B:\n def __init__(self, a): ...\nclass A(B): ...", Arguments(("a",))),
        ("class A(B): ...\nclass B(A): ...", None),
        ("if x:\n class A: ...\nelse:\n class A: ...", None),
        ("def A(a, b=2): ...", Arguments(("a",), ("b",))),
        ("A = make()", None),
        ("from dataclasses import dataclass\n@dataclass(init=False)\nclass A:\n a: int", None),
        (FIELDS.replace("Digits", "A"), Arguments(("lr", "depth", "kept"), ("width", "names"))),
    ],
)
def test_what_a_constructor_takes(tmp_path: Path, text: str, expected: Arguments | None) -> None:
    (tmp_path / "x.py").write_text(text + "\n")
    assert Source(tmp_path / "x.py").arguments("A") == expected


# -- scripts -----------------------------------------------------------------------------------


def test_a_script_is_there_and_is_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("print('hello'\n")
    for script, expected in (
        ("train.py", ("job.not-python", "train.py:1:6", "'(' was never closed")),
        ("trian.py", ("job.script-not-found", "job.yaml:2:9: script", "trian.py", "'train.py'")),
    ):
        (tmp_path / "job.yaml").write_text(f"name: mine\nscript: {script}\n")
        with pytest.raises(JobError) as caught:
            load_job("job.yaml")
        assert_problems(caught.value.problems, expected)


def test_a_task_has_no_command_line(check: Check) -> None:
    assert_problems(
        check(extra="script_args: [--lr]\n"),
        ("job.field-without-effect", "job.yaml:6:14: script_args", "script", "args"),
    )


# -- lightning ---------------------------------------------------------------------------------

LIT = """
import pytorch_lightning as pl

class Base(pl.LightningModule):
    pass

class Digits(Base):
    pass
"""


def test_a_lightning_module_needs_its_trainer(check: Check, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(LIT)
    strategies = "single, ddp, fsdp, exact"
    needs = ("lightning.needs-trainer", "job.yaml:2:7: task", "Digits", "trainer: lightning")
    assert_problems(check(), (*needs, strategies))
    assert check(extra="trainer: lightning\n") == []
    place = "job.yaml:7:11: strategy"
    assert_problems(
        check(extra="trainer: lightning\nstrategy: dp\n"),
        ("plan.unsupported-combination", place, "'lightning'", "'dp'", strategies),
    )


def test_lightnings_other_package(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "import lightning as L\nclass Digits(L.LightningModule): pass\n"
    (tmp_path / "task.py").write_text(other)
    assert check(extra="trainer: lightning\n") == []
    needs = ("lightning.needs-trainer", "job.yaml:2:7: task", "Digits", "trainer: lightning")
    assert_problems(check(), needs)
    found = importlib.util.find_spec
    gone = lambda name, *more: None if name == "lightning" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    hints = ("task.py", "pip install lightning", "import pytorch_lightning")
    assert_problems(
        check(extra="trainer: lightning\n"),
        ("job.missing-import", "job.yaml:2:7: task", *hints),
    )
    either = "try:\n    import lightning as L\nexcept ImportError:\n    import pytorch_lightning\n"
    (tmp_path / "task.py").write_text(either + "class Digits(L.LightningModule): pass\n")
    assert check(extra="trainer: lightning\n") == []


def test_what_of_lightnings_trainer_the_job_decides(check: Check) -> None:
    section = "lightning: {trainer: {max_epochs: 3, profiler: simple}}\n"
    place = "job.yaml:7:35: lightning.trainer.max_epochs"
    assert_problems(
        check(extra=f"trainer: lightning\n{section}"),
        ("job.field-decided-elsewhere", place, "train.epochs"),
    )
    assert_problems(
        check(extra=section),
        ("job.field-without-effect", "job.yaml:6:1: lightning", "trainer lightning"),
    )


def test_a_module_that_makes_its_own_steps(check: Check, tmp_path: Path) -> None:
    init = (
        "  def __init__(self):\n    super().__init__()\n    self.automatic_optimization = False\n"
    )
    text = f"import lightning as L\nclass Digits(L.LightningModule):\n{init}"
    (tmp_path / "task.py").write_text(text)
    assert check(extra="trainer: lightning\n") == []
    names = ("Digits", "automatic_optimization = False", "lightning.step: dtrain")
    assert_problems(
        check(extra="trainer: lightning\nlightning: {step: dtrain}\n"),
        ("lightning.needs-own-loops", "job.yaml:2:7: task", *names),
    )


@pytest.mark.parametrize(
    ("section", "code", "place", "name"),
    [
        ("{step: dtrain, trainer: {limit_train_batches: 2}}", "job.field-decided-elsewhere",
         "58: lightning.trainer.limit_train_batches", "train.steps"),
        ("{step: dtrain, also_run: [test]}", "job.field-without-effect",
         "37: lightning.also_run", "step: dtrain"),
        ("{step: lightning}\nstrategy: exact", "plan.unsupported-combination",
         "19: lightning.step", "'exact'"),
        ("{trainer: {max_epochs: 2}}", "job.field-decided-elsewhere",
         "35: lightning.trainer.max_epochs", "train.epochs"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_way_of_stepping(
    check: Check, section: str, code: str, place: str, name: str
) -> None:
    problems = check(extra=f"trainer: lightning\nlightning: {section}\n")
    assert_problems(problems, (code, f"job.yaml:7:{place}", name))


def test_an_argument_that_lightnings_trainer_does_not_have(check: Check) -> None:
    section = "lightning: {trainer: {logr: true, callbacks: [], profiler: simple}}\n"
    field = "lightning.trainer"
    instead = ("configure_callbacks()", " callbacks()")
    assert_problems(
        check(extra=f"trainer: lightning\n{section}"),
        ("lightning.no-such-argument", f"job.yaml:7:23: {field}.logr", "'logger'"),
        ("job.field-decided-elsewhere", f"job.yaml:7:46: {field}.callbacks", *instead),
    )


def test_a_data_module_is_checked_as_a_task_is(check: Check, tmp_path: Path) -> None:
    text = "import lightning as L\nclass Data(L.LightningDataModule):\n  def setup(self, s): ...\n"
    (tmp_path / "data.py").write_text(text + "class More(Data):\n  def __init__(self, n): ...\n")

    def problems(section: str) -> Sequence[Problem]:
        return check(extra=f"trainer: lightning\nlightning: {{data_module: {section}}}\n")

    assert problems("'data.py:Data'") == []
    assert problems("'data.py:More', data_args: {n: 3}") == []
    place = "job.yaml:7:26: lightning.data_module"
    assert_problems(problems("'dta.py:Data'"), ("job.code-not-found", place, "dta.py", "'data.py'"))
    names = ("data.py", "'Date'", "Data, More", "'Data'")
    assert_problems(problems("'data.py:Date'"), ("job.class-not-found", place, *names))
    field = "lightning.data_args.n"
    assert_problems(
        problems("'data.py:Data', data_args: {n: 3}"),
        ("job.unknown-argument", f"job.yaml:7:54: {field}", "Data", "none"),
    )
    assert_problems(
        problems("'data.py:More'"), ("job.missing-argument", f"job.yaml:7:26: {field}", "More")
    )


def test_a_missing_extra_is_one_line(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = replace(
        catalog.TRAINERS["lightning"], needs=catalog.Needs(("not_installed_anywhere",), "lightning")
    )
    monkeypatch.setitem(catalog.TRAINERS, "lightning", fact)  # type: ignore[arg-type]
    names = ("'lightning'", "not_installed_anywhere", "pip install 'dtrain[lightning]'")
    (problem,) = check(extra="trainer: lightning\n")
    assert_problems([problem], ("plan.missing-package", "job.yaml:6:10: trainer", *names))
    assert "\n" not in str(problem)


# -- Keras -------------------------------------------------------------------------------------

KERAS = """
from dtrain.keras import KerasTask

class Base(KerasTask):
    pass

class Digits(Base):
    def compiled(self):
        model.compile("adam", "mse", jit_compile=True, steps_per_execution=2)
"""
FUNCTION = """
def Digits():
    import keras
    return model, {"x": x}
"""


@pytest.mark.parametrize("source", [KERAS.partition("    def")[0] + "    pass", FUNCTION])
def test_what_a_keras_model_cannot_be_trained_with(
    source: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    (tmp_path / "task.py").write_text(source)
    assert check() == []
    names = ("'fsdp'", "Keras", "'ddp'", "single, dp, ddp and exact")
    assert_problems(
        check(extra="strategy: fsdp\n"),
        ("plan.unsupported-combination", "job.yaml:6:11: strategy", *names),
    )
    hints = ("'torch'", "--env KERAS_BACKEND=torch")
    place = "job.yaml:6:31: launch.env.KERAS_BACKEND"
    assert_problems(
        check(extra="launch: {env: {KERAS_BACKEND: jax}}\n"),
        ("keras.other-backend", place, "'jax'", *hints),
    )
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    inherited = "'tensorflow' in the environment"
    assert_problems(check(), ("keras.other-backend", "job.yaml:2:7: task", inherited, *hints))
    assert check(extra="launch: {env: {KERAS_BACKEND: torch}}\n") == []


def test_what_compile_cannot_be_given(check: Check, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(KERAS)
    assert_problems(
        check(),
        ("keras.compile-argument", "task.py:9:38", "compile(jit_compile=True)"),
        ("keras.compile-argument", "task.py:9:56", "compile(steps_per_execution=2)"),
    )


def test_keras_is_needed(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task.py").write_text(FUNCTION)
    monkeypatch.setattr("dtrain.catalog.find_spec", lambda name: None)
    names = ("keras", "pip install 'dtrain[keras]'")
    assert_problems(check(), ("plan.missing-package", "job.yaml:2:7: task", *names))


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ('"""Says what."""\nimport os\nBatch = list[int]\nclass A: ...\n', True),
        ("def main(): ...\nmain()\n", False),
        ("def main(): ...\ncode = main()\n", False),
        ("def main(): ...\nif __name__ == '__main__':\n    main()\n", False),
        ("for step in range(3):\n    pass\n", False),
        ("def (\n", False),
    ],
)
def test_a_script_that_does_nothing(tmp_path: Path, text: str, idle: bool) -> None:
    (tmp_path / "x.py").write_text(text)
    assert does_nothing(tmp_path / "x.py") == idle
