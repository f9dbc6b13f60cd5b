"""Recording of a training for `dtrain verify`, at the calls of the user's objects.

The record does not depend on values of the trainer and the strategy. It has the gradients that the
user's optimizer received, the losses that the user's `loss` returned, and the random numbers that
were drawn. A trainer makes two calls, `read` and `step`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from dtrain.ranks import RankInfo
from dtrain.run.rundir import RunDir
from dtrain.task import Loss, Task
from dtrain.trace import RankLine, StepRecord, Tensors, TraceOptions, Writer
from dtrain.train.checkpoint.state import plain_name, plain_parameters
from dtrain.train.data.fetch import Contents
from dtrain.train.data.permutation import Ids
from dtrain.train.tracing import digest, perturb
from dtrain.train.tracing.attributes import Attributes
from dtrain.train.tracing.noise import Draws, FixedNoise

Named = Iterable[tuple[str, torch.Tensor]]


class Recorder:
    """Watches one rank's task, and writes what each step did.

    It wraps the methods of the task object; the task's class is not changed.
    """

    def __init__(self, run: RunDir, ranks: RankInfo, task: Task, options: TraceOptions) -> None:
        self._writer = Writer(run.recording, ranks.rank)
        self._ranks = ranks
        self._options = options
        self._ids: list[list[int]] = []
        self._contents: list[Contents] = []
        self._losses: list[tuple[torch.Tensor, float | torch.Tensor | None]] = []
        self._model: torch.nn.Module | None = None
        self._facts: dict[str, Any] = {}
        self._begun: str | None = None
        """The digest of the parameters that `model` made."""
        self._gradients = Tensors()
        self._given: str | None = None
        """The digest of the gradients that this rank's optimizer received."""
        self._lr: list[float] = []
        self._stepped = 0
        self._begins = True
        """Whether the initial state is written."""
        self._random = ""
        self._attributes = Attributes(task, options.frozen)
        self._noise = None if options.own_noise else FixedNoise(by_sample=options.by_sample)
        self._step_context = contextlib.ExitStack()
        """A context that is open from the first loss of a step to the end of its last backward."""
        self._draws = Draws()
        self._wrap(task)

    @classmethod
    def asked_for(cls, run: RunDir, ranks: RankInfo, task: Task) -> Recorder | None:
        """Return a recorder if the environment requests one, else None."""
        options = TraceOptions.from_env(os.environ)
        return None if options is None else cls(run, ranks, task, options)

    # -- for trainers ------------------------------------------------------------------------

    def read(self, ids: Ids, contents: Contents | None = None) -> None:
        """Record a micro-batch that this rank has read."""
        if not self._random:
            self._random = digest.of_random_state()
        self._ids.append(ids.tolist())
        self._contents.append(contents or [])

    def step(
        self,
        step: int,
        epoch: int,
        *,
        loss: float | None,
        grad_norm: float | None,
    ) -> None:
        """Write what a step did. All ranks must call it at the step boundary."""
        random = digest.of_random_state()
        self._write_line(
            step,
            epoch=epoch,
            ids=self._ids,
            random=random,
            drew=bool(self._random) and random != self._random,
        )
        self._write_record(step, loss=loss, grad_norm=grad_norm)
        self._random = random
        self._ids, self._contents, self._losses, self._lr = [], [], [], []
        self._gradients, self._given, self._stepped = Tensors(), None, 0

    def loaded(self, model: torch.nn.Module) -> None:
        """Record the initial values that have replaced those of `model()`."""
        self._begun = digest.of_tensors(model.parameters())

    def resumes(self) -> None:
        """Leave out the initial state: an earlier attempt has written it, and it is loaded once."""
        self._begins = False

    # -- for a trainer with its own steps ----------------------------------------------------

    def watch_module(self, module: Any) -> None:
        """Record the batches and losses of the `training_step` of a LightningModule."""
        self._watch_model(module)
        self._facts["own_steps"] = not module.automatic_optimization
        step = module.training_step

        @functools.wraps(step)
        def watched(batch: Any, *given: Any, **named: Any) -> Any:
            returned: Any = None

            def loss(_: Any, batch: Any) -> torch.Tensor:
                nonlocal returned
                returned = step(batch, *given, **named)
                found = returned.get("loss") if isinstance(returned, Mapping) else returned
                return torch.zeros(()) if found is None else found

            self._watched_loss(self._in_precision(loss))(module, batch)
            return returned

        module.training_step = watched

    def watch_optimizers(
        self, optimizers: Iterable[torch.optim.Optimizer], *, resumed: bool
    ) -> None:
        """Record the gradients of the optimizers; unless resumed, write the initial state."""
        for optimizer in optimizers:
            # a hook after the step: `step` may get a closure that computes the gradients
            optimizer.register_step_post_hook(self._before_update)
        if not resumed:
            self._begin_lines()

    @property
    def in_fp64(self) -> bool:
        """Whether everything is computed in fp64."""
        return self._options.fp64

    def shortened(self, dataset: Any, task: Task) -> Any:
        """Return the part of a training data set that this run reads."""
        return self._shortened(dataset, task)

    def evaluated(self, dataset: Any) -> Any:
        """Return the part of an evaluation data set that this run reads."""
        return perturb.first_samples(dataset, self._options.max_eval_samples)

    # -- around the task ---------------------------------------------------------------------

    def _wrap(self, task: Task) -> None:
        methods: dict[str, Callable[..., Any]] = {
            name: getattr(task, name)
            for name in ("model", "optimizer", "loss", "evaluate", "train_dataset", "eval_dataset")
        }
        own = vars(task)
        own["model"] = lambda: self._watch_model(methods["model"]())
        own["optimizer"] = lambda model: self._watch_optimizer(methods["optimizer"](model))
        own["loss"] = self._watched_loss(self._in_precision(methods["loss"]))
        own["evaluate"] = self._watched_evaluation(self._in_precision(methods["evaluate"]))
        own["train_dataset"] = lambda: self._shortened(methods["train_dataset"](), task)
        own["eval_dataset"] = lambda: self.evaluated(methods["eval_dataset"]())

    def _shortened(self, dataset: Any, task: Task) -> Any:
        """Return the first samples; all of them if the task's own order needs all."""
        if task.sample_order(0, 0) is None and task.sample_weights() is None:
            dataset = perturb.first_samples(dataset, self._options.max_train_samples)
        with contextlib.suppress(TypeError):  # a stream
            self._facts["num_samples"] = len(dataset)
        return dataset

    def _watch_model(self, model: Any) -> Any:
        if not isinstance(model, torch.nn.Module):
            return model
        self._model = model
        self._begun = digest.of_tensors(model.parameters())
        self._facts["batch_norm"] = perturb.batch_norms(model)
        self._facts["of_keras"] = perturb.is_of_keras(model)
        if self._options.fp64:
            model.double()
        if not self._options.own_noise:
            perturb.stop_dropout(model)
        if not self._options.batch_norm:
            perturb.freeze_batch_norm(model)
        return model

    def _watch_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_pre_hook(self._before_update)
        self._begin_lines()
        return optimizer

    def _begin_lines(self) -> None:
        self._attributes.keep()
        if not self._begins:
            return
        self._write_line(0, epoch=0, ids=[], random=digest.of_random_state(), drew=False)
        self._write_record(0, loss=None, grad_norm=None)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._step_context.close()
        self._stepped += 1
        self._lr = [float(group["lr"]) for group in optimizer.param_groups]
        gradients = [(name, p.grad) for name, p in self._parameters() if p.grad is not None]
        self._gradients = self._tensors(gradients)
        if not any(hasattr(each, "full_tensor") for _, each in gradients):
            self._given = digest.of_tensors(each for _, each in gradients)

    def _in_precision(self, method: Callable[..., Any]) -> Callable[..., Any]:
        if not self._options.fp64:
            return method

        def in_double(model: torch.nn.Module, batch: Any) -> Any:
            with perturb.double_by_default():
                return method(model, perturb.to_double(batch))

        return in_double

    def _watched_loss(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(model: torch.nn.Module, batch: Any) -> Any:
            if not torch.is_grad_enabled():
                return method(model, batch)
            self._attributes.put_back()
            value = self._with_fixed_noise(method, model, batch)
            total, weight = (value.sum, value.weight) if isinstance(value, Loss) else (value, None)
            self._losses.append((torch.as_tensor(total).detach(), weight))
            return value

        return watched

    def _with_fixed_noise(self, method: Callable[..., Any], *given: Any) -> Any:
        """Call `loss` with fixed noise. A layer that backward computes again draws the same."""
        if self._noise is None:
            return method(*given)
        self._step_context.close()
        self._step_context.enter_context(self._noise)
        self._noise.begin(given[-1])
        watching = contextlib.nullcontext() if self._losses else self._draws.watching()
        with watching:
            return method(*given)

    def _watched_evaluation(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(model: torch.nn.Module, batch: Any) -> Any:
            self._attributes.put_back()
            if self._noise is None:
                return method(model, batch)
            with self._noise:
                self._noise.begin(batch)
                return method(model, batch)

        return watched

    # -- writing -----------------------------------------------------------------------------

    def _write_line(
        self, step: int, *, epoch: int, ids: list[list[int]], random: str, drew: bool
    ) -> None:
        parameters = [parameter for _, parameter in self._parameters()]
        in_parts = any(hasattr(parameter, "full_tensor") for parameter in parameters)
        made = self._begun if step == 0 else None if in_parts else digest.of_tensors(parameters)
        losses = [
            (float(total), None if weight is None else float(weight))
            for total, weight in self._losses
        ]
        self._writer.line(
            RankLine(
                step=step,
                epoch=epoch,
                ids=ids,
                contents=self._contents,
                losses=losses,
                stepped=self._stepped,
                parameters=made,
                buffers={name: digest.of_tensors([each]) for name, each in self._buffers()},
                lr=self._lr,
                gradients=self._given,
                state=self._attributes.digests(self._model),
                draws=self._places(),
                random=random,
                drew=drew,
            )
        )

    def _places(self) -> list[str]:
        drawn = set() if self._noise is None else self._noise.places
        return sorted(drawn | self._draws.places)

    def _write_record(self, step: int, *, loss: float | None, grad_norm: float | None) -> None:
        parameters = self._tensors(self._parameters())
        if not self._ranks.is_rank_zero:
            return
        self._writer.step(
            StepRecord(
                step=step,
                loss=loss,
                grad_norm=grad_norm,
                gradients=self._gradients,
                parameters=parameters,
                buffers=self._tensors(self._buffers()),
                facts=self._facts,
            )
        )

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        assert self._model is not None
        return list(plain_parameters(self._model).items())

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        assert self._model is not None
        return [(plain_name(name), each) for name, each in self._model.named_buffers()]

    def _tensors(self, named: Named) -> Tensors:
        """Return the tensors on rank 0, and none elsewhere. All ranks must call it: it gathers."""
        tensors = Tensors()
        for name, tensor in named:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self._ranks.is_rank_zero:
                tensors.vectors[name] = digest.as_vector(name, whole)
                tensors.digests[name] = digest.of_tensors([whole])
                tensors.norms[name] = digest.norm_of(whole)
        return tensors
