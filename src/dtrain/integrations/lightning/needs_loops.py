"""The reasons why dtrain's step cannot train a LightningModule unchanged."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from dtrain.errors import UsageError
from dtrain.integrations.lightning.compat import PACKAGE, is_overridden, pl


class NeedsLoopsError(UsageError):
    """dtrain's step cannot train the module; the message gives the reason."""

    code = "lightning.needs-own-loops"


_LOOP_HOOKS = (
    "optimizer_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_model_zero_grad",
    "on_validation_model_eval",
    "on_validation_model_train",
    "configure_sharded_model",
    "transfer_batch_to_device",
    "on_save_checkpoint",
    "on_load_checkpoint",
)
"""Hooks of a LightningModule that dtrain's step does not call."""

_DATA_HOOKS = ("on_exception", "state_dict", "load_state_dict", "transfer_batch_to_device")
"""Hooks of a data module that dtrain's step does not call."""


def why_module_needs_loops(module: Any, data_module: Any) -> str | None:
    """Return why a module needs Lightning's own loops; None if dtrain's step is enough."""
    name = type(module).__name__
    if not module.automatic_optimization:
        return f"{name} has automatic_optimization = False: it makes its own steps"
    for hook in _LOOP_HOOKS:
        if is_overridden(hook, module, pl.LightningModule):
            return f"{name} overrides {hook}()"
    for hook in _DATA_HOOKS:
        if data_module is not None and is_overridden(hook, data_module, pl.LightningDataModule):
            return f"{type(data_module).__name__} overrides {hook}()"
    code = _code(type(module))
    if _may_skip(code):
        return f"training_step() of {name} may return None, to skip a batch"
    if _may_end_epoch(code):
        return f"on_train_batch_start() of {name} may return -1, to end an epoch"
    if any(isinstance(node, ast.Attribute) and node.attr == "all_gather" for node in code):
        return f"{name} calls all_gather(): its loss uses the samples of all processes"
    return None


def _code(kind: type) -> list[ast.AST]:
    """Return all nodes of the user's classes, the most derived first; empty without source."""
    nodes: list[ast.AST] = []
    for base in kind.__mro__:
        if base.__module__.startswith(PACKAGE):
            break
        try:
            nodes += ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError, SyntaxError):
            continue
    return nodes


def _may_skip(code: list[ast.AST]) -> bool:
    returned = _returned(code, "training_step")
    return any(each is None or ast.unparse(each) == "None" for each in returned)


def _may_end_epoch(code: list[ast.AST]) -> bool:
    returned = _returned(code, "on_train_batch_start")
    return any(each is not None and "-1" in ast.unparse(each) for each in returned)


def _returned(code: list[ast.AST], method: str) -> list[ast.expr | None]:
    """Return the value of each return statement of the most derived of these methods."""
    found = [each for each in code if isinstance(each, ast.FunctionDef) and each.name == method]
    inside = ast.walk(found[0]) if found else ()
    return [each.value for each in inside if isinstance(each, ast.Return)]
