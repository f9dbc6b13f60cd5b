"""Read a Python script, above all one that uses Lightning. Nothing of it is run."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.errors import UsageError
from dtrain.initializing.existing import Existing
from dtrain.integrations.lightning.job_check import (
    DECIDED_BY_JOB,
    DECIDED_FOR_LOOPS,
    trainer_arguments,
)
from dtrain.job.located import shown_path
from dtrain.job.static_check import file_of
from dtrain.job.static_source import Arguments, Source, parsed

_PRECISIONS = {"32": "fp32", "bf16": "bf16", "16": "fp16"}
_STRATEGIES = {"auto": "ddp", "ddp": "ddp", "fsdp": "fsdp"}
_FIND_UNUSED = "ddp_find_unused_parameters_true"
_EPOCHS = 1000
"""What Lightning does without `max_epochs` and `max_steps`."""
_BATCH = 32
_LOADERS = "fit() gets its loaders from the script, not from the module or a data module"
_NOT_CONSTANT = object()


class _CannotBeTask(Exception):
    """The reason why a job runs the script as it is, instead of its LightningModule."""


def read_python(path: Path, folder: Path) -> Existing:
    """Return a job that trains the LightningModule of a script, or else one that runs the script.

    Raises:
        UsageError: the file is not Python.
    """
    try:
        tree, source = parsed(path), Source(path)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        text = f"{shown_path(path)}:{line}: it is not Python: {getattr(error, 'msg', error)}"
        raise UsageError(text, code="job.not-python") from None
    found = Existing(name=path.stem)
    script = os.path.relpath(path.resolve(), folder.resolve())
    if not any(source.imports(package) for package in catalog.LIGHTNING):
        found.job["script"] = script
        return found
    reader = _Reader(path, folder, tree, source, found)
    trainer = reader.trainer()
    try:
        reader.read_task(trainer)
    except _CannotBeTask as reason:
        found.leave_out(shown_path(path), "trainer: lightning", f"{reason}; it runs as a script")
        found.job = {"script": script}
        reader.read_sizes(trainer)
    return found


class _Reader:
    """Reads one script."""

    def __init__(
        self, path: Path, folder: Path, tree: ast.Module, source: Source, found: Existing
    ) -> None:
        self._path = path
        self._folder = folder
        self._tree = tree
        self._source = source
        self._found = found

    # -- the Trainer -------------------------------------------------------------------------------

    def trainer(self) -> ast.Call | None:
        """Return the first call of Lightning's Trainer."""
        calls = [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] == "Trainer"
            and self._origin(node.func).partition(".")[0] in catalog.LIGHTNING
        ]
        calls.sort(key=lambda call: call.lineno)
        for call in calls[1:]:
            self._leave_out(call, "a further Trainer(...)", "the first one is taken")
        return calls[0] if calls else None

    def read_sizes(self, trainer: ast.Call | None) -> None:
        """Take nodes and devices from a Trainer."""
        for keyword in trainer.keywords if trainer else ():
            if keyword.arg in ("devices", "num_nodes", "accelerator"):
                self._size(keyword, _constant(keyword.value))

    def _size(self, keyword: ast.keyword, value: Any) -> None:
        found = self._found
        if keyword.arg == "num_nodes" and _is_count(value):
            found.nodes = str(value)
        elif keyword.arg == "devices" and isinstance(value, list) and value:
            found.procs = len(value)
        elif keyword.arg == "devices" and _is_count(str(value)):
            found.procs = int(value)
        elif keyword.arg == "devices" and value in ("auto", -1, "-1"):
            found.procs = "auto"
        elif keyword.arg == "accelerator" and value in ("auto", "gpu", "cuda", "cpu"):
            found.gpus = 0 if value == "cpu" else None
        else:
            self._leave_out(keyword, _shown(keyword), "give --procs, --gpus or --nodes")

    # -- the module and its data -------------------------------------------------------------------

    def read_task(self, trainer: ast.Call | None) -> None:
        """Make a task of the LightningModule that the script trains.

        Raises:
            _CannotBeTask: there is none that dtrain could make.
        """
        fit = self._call_of(trainer, "fit")
        self._refuse_run_at_import(fit)
        module, args, source = self._module(fit)
        data, data_args, data_source = self._data(fit) or (None, {}, source)
        self._found.batch_per_process = self._batch(data_source, data_args or args)
        section = {"data_module": data, "data_args": data_args}
        job: dict[str, Any] = {"task": module, "args": args, "trainer": "lightning"}
        job = {name: value for name, value in job.items() if value}
        job["train"] = {}
        if source.has_method(module.rpartition(":")[2], "validation_step"):
            job["eval"] = {"every_epochs": 1}
        job["lightning"] = {name: value for name, value in section.items() if value}
        self._found.job = job
        for keyword in trainer.keywords if trainer else ():
            self._argument(keyword, _constant(keyword.value))
        for each in trainer.args if trainer else ():
            self._leave_out(each, ast.unparse(each), "write it with its name")
        self._further_calls(trainer, fit)
        if not {"epochs", "steps"} & {*job["train"]}:
            job["train"]["epochs"] = _EPOCHS

    def _module(self, fit: ast.Call | None) -> tuple[str, dict[str, Any], Source]:
        """Return the reference of the LightningModule, its arguments, and its file."""
        model = self._given(fit, 0, "model")
        if model is not None:
            return self._made(model)
        names = self._source.classes()
        modules = [name for name in names if self._source.derives(name, "LightningModule")]
        if len(modules) != 1:
            raise _CannotBeTask("it does not show which LightningModule is trained")
        return self._from_folder(f"{self._path.name}:{modules[0]}"), {}, self._source

    def _data(self, fit: ast.Call | None) -> tuple[str, dict[str, Any], Source] | None:
        """Return the same of the data module; None if fit() gets no data."""
        data = self._given(fit, 3, "datamodule") or self._given(fit, 1, "train_dataloaders")
        if data is None:
            return None
        if not isinstance(data, ast.Call) or ast.unparse(data.func).endswith("DataLoader"):
            raise _CannotBeTask(_LOADERS)
        made = self._made(data)
        if not made[2].derives(made[0].rpartition(":")[2], "LightningDataModule"):
            raise _CannotBeTask(_LOADERS)
        return made

    def _further_calls(self, trainer: ast.Call | None, fit: ast.Call | None) -> None:
        """Take the seed; note what else the script does with the Trainer."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and node.args:
                name, seed = ast.unparse(node.func).rpartition(".")[2], _constant(node.args[0])
                if name == "seed_everything" and (_is_count(seed) or seed == 0):
                    self._found.job["seed"] = int(seed)
        for method in ("validate", "test", "predict"):
            if call := self._call_of(trainer, method):
                text = f"lightning.also_run: [{method}] does it"
                self._leave_out(call, f"{method}()", text)
        for keyword in fit.keywords if fit else ():
            if keyword.arg == "ckpt_path" and _constant(keyword.value) is not None:
                text = "`dtrain resume` continues a run; checkpoint.init_from takes weights"
                self._leave_out(keyword, _shown(keyword), text)

    def _refuse_run_at_import(self, fit: ast.Call | None) -> None:
        """Refuse a script that trains when it is imported."""
        for statement in self._tree.body:
            if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
                continue
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
            names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
            if fit in calls or names & {"LightningCLI", *self._functions()}:
                line = statement.lineno
                raise _CannotBeTask(
                    f"line {line} trains when the file is imported: put it below "
                    'if __name__ == "__main__" and write the job again'
                )

    def _call_of(self, trainer: ast.Call | None, method: str) -> ast.Call | None:
        """Return the first call of a method of the Trainer."""
        for call in ast.walk(self._tree):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == method
                and self._resolved(call.func.value) is trainer
            ):
                return call
        return None

    def _functions(self) -> set[str]:
        found = self._source.definitions
        return {name for name, each in found.items() if not isinstance(each[-1], ast.ClassDef)}

    def _given(self, call: ast.Call | None, position: int, name: str) -> ast.expr | None:
        """Return an argument of a call; for a variable, the call that makes its value."""
        if call is None:
            return None
        by_name = [each.value for each in call.keywords if each.arg == name]
        given = [*by_name, *call.args[position : position + 1]]
        if not given or (isinstance(given[0], ast.Constant) and given[0].value is None):
            return None
        return self._resolved(given[0])

    def _resolved(self, node: ast.expr) -> ast.expr:
        if not isinstance(node, ast.Name):
            return node
        for each in ast.walk(self._tree):
            if isinstance(each, ast.Assign) and isinstance(each.value, ast.Call):
                names = [target.id for target in each.targets if isinstance(target, ast.Name)]
                if node.id in names:
                    return each.value
        return node

    def _made(self, node: ast.expr) -> tuple[str, dict[str, Any], Source]:
        """Return the reference of the class that a call makes, its arguments, and its file."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            raise _CannotBeTask(f"{ast.unparse(node)} is not the call of a class")
        name = ast.unparse(node.func)
        reference, source = f"{self._path.name}:{name}", self._source
        if name not in self._source.definitions:
            module, _, name = self._origin(node.func).rpartition(".")
            reference = f"{module}:{name}"
            file = file_of(reference, self._path.parent) if module else None
            if file is None or not file.is_file():
                raise _CannotBeTask(f"the file of {ast.unparse(node.func)} was not found")
            source = Source(file)
        takes = source.arguments(name)
        return self._from_folder(reference), self._constants(node, takes), source

    def _constants(self, call: ast.Call, takes: Arguments | None) -> dict[str, Any]:
        """Return the arguments of a call that are constants, by name; note the others."""
        names = [*takes.required, *takes.optional] if takes else []
        pairs = [*zip(names, call.args, strict=False)]
        if len(pairs) < len(call.args):
            raise _CannotBeTask(f"the arguments of {ast.unparse(call)} have no names")
        pairs += [(each.arg or "**", each.value) for each in call.keywords]
        found = {}
        for name, node in pairs:
            value = _constant(node)
            if value is not _NOT_CONSTANT:
                found[name] = value
            elif takes is None or name in takes.required or name == "**":
                text = f"line {node.lineno}: {name}={ast.unparse(node)} is known only when it runs"
                raise _CannotBeTask(text)
            else:
                self._leave_out(node, f"{name}={ast.unparse(node)}", "its default is taken")
        return found

    def _batch(self, source: Source, args: dict[str, Any]) -> int:
        """Return the batch size of a loader."""
        for keyword in source.keywords_of("DataLoader", "batch_size"):
            if _is_count(value := _constant(keyword.value)):
                return int(value)
        if _is_count(args.get("batch_size")):
            return int(args["batch_size"])
        for default in source.defaults_of("batch_size"):
            if _is_count(value := _constant(default)):
                return int(value)
        self._found.leave_out(
            shown_path(self._path), "the batch size", f"not found; {_BATCH} for each process"
        )
        return _BATCH

    def _from_folder(self, reference: str) -> str:
        """Return a reference to a file next to the script from the directory of job.yaml."""
        target, _, name = reference.rpartition(":")
        if not target.endswith(".py"):
            return reference
        file = (self._path.parent / target).resolve()
        return f"{os.path.relpath(file, self._folder.resolve())}:{name}"

    # -- the arguments of the Trainer --------------------------------------------------------------

    def _argument(self, keyword: ast.keyword, value: Any) -> None:
        """Carry over one argument of the Trainer, or say why not."""
        job, name = self._found.job, keyword.arg or "**"
        train = job["train"]
        if name in ("devices", "num_nodes", "accelerator"):
            self._size(keyword, value)
        elif name == "max_epochs" and _is_count(value):
            train["epochs"] = value
        elif name == "max_steps" and _is_count(value):
            train["steps"] = value
        elif name in ("max_epochs", "max_steps") and value in (-1, None):
            pass
        elif name == "precision" and (word := str(value).split("-")[0]) in _PRECISIONS:
            self._precision(keyword, value, word)
        elif name == "strategy" and value in (*_STRATEGIES, _FIND_UNUSED):
            job["strategy"] = _STRATEGIES.get(value, "ddp")
            if value == _FIND_UNUSED:
                job["lightning"]["find_unused"] = True
        elif name == "gradient_clip_val" and isinstance(value, int | float) and value > 0:
            train["clip_grad_norm"] = float(value)
        elif name == "accumulate_grad_batches" and _is_count(value):
            assert self._found.batch_per_process is not None
            train["micro_batch_size"] = self._found.batch_per_process
            self._found.batch_per_process *= value
        elif name == "check_val_every_n_epoch" and _is_count(value):
            job["eval"] = {"every_epochs": value}
        elif name == "val_check_interval" and isinstance(value, int) and _is_count(value):
            job["eval"] = {"every_steps": value}
        elif name == "log_every_n_steps" and _is_count(value):
            job["log"] = {"every_steps": value}
        elif name in DECIDED_FOR_LOOPS or name == "gradient_clip_algorithm":
            if (name, value) != ("gradient_clip_algorithm", "norm"):
                self._leave_out(keyword, _shown(keyword), DECIDED_BY_JOB[name])
        elif value is not _NOT_CONSTANT and name in trainer_arguments():
            job["lightning"].setdefault("trainer", {})[name] = value
        else:
            self._leave_out(keyword, _shown(keyword), "it is known only when the script runs")

    def _precision(self, keyword: ast.keyword, value: Any, word: str) -> None:
        if str(value).endswith("-true") and word != "32":
            self._leave_out(keyword, _shown(keyword), f"{_PRECISIONS[word]} autocast is taken")
        if word != "32":
            self._found.job["train"]["precision"] = _PRECISIONS[word]

    # -- helpers -----------------------------------------------------------------------------------

    def _origin(self, node: ast.expr) -> str:
        """Return the full name of what an expression names, for example `lightning.Trainer`."""
        first, dot, rest = ast.unparse(node).partition(".")
        return f"{self._source.origins.get(first, first)}{dot}{rest}"

    def _leave_out(self, node: ast.expr | ast.keyword, what: str, why: str) -> None:
        self._found.leave_out(f"{shown_path(self._path)}:{node.lineno}", what, why)


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return _NOT_CONSTANT


def _is_count(value: Any) -> bool:
    """Return whether a value, or its text, is a whole number above 0."""
    text = str(value)
    return not isinstance(value, bool) and text.isascii() and text.isdigit() and int(text) > 0


def _shown(keyword: ast.keyword) -> str:
    return f"{keyword.arg or '**'}={ast.unparse(keyword.value)}"
