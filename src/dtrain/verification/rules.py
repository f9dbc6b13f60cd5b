"""The rules of "the same training", and the findings when a rule does not hold."""

from __future__ import annotations

from dataclasses import dataclass

DATA = "step s trains on the same ordered list of samples, each once"
START = "all processes start with the parameters that the seed gives"
LOSS = "a sample's loss does not depend on which process computes it"
STATE = "state that changes during training is in the checkpoint, and changes once per step"
BATCH_NORM = "BatchNorm normalises over the whole batch"
GRADIENT = "the gradient is that of (sum of all losses) / (sum of all weights)"
CLIPPING = "clipping comes after the reduction"
SCALER = "gradients are divided by the loss scale before anything uses them"
SCHEDULE = "the learning rate depends only on the number of optimizer steps"
UPDATE = "there is one update per global batch, from that gradient and the optimizer's state"
REPLICAS = "after a step every rank holds the same parameters"
BUFFERS = "after a step every rank holds the buffers of one process"
RANDOM = "ranks draw independent random numbers"
EVALUATION = "every sample is evaluated exactly once"
BITWISE = "layouts that promise the same bits have the same bits"
COMPILED = "compiled code computes the same as the code that it is made of"
MODEL = "model() gives every process the same bare model"

RULE_CODES = {
    DATA: "verify.other-samples",
    START: "verify.other-start",
    LOSS: "verify.other-loss",
    STATE: "verify.state-outside-checkpoint",
    BATCH_NORM: "verify.batch-norm",
    GRADIENT: "verify.other-gradient",
    CLIPPING: "verify.clipping-order",
    SCALER: "verify.loss-scaling",
    SCHEDULE: "verify.other-learning-rate",
    UPDATE: "verify.other-updates",
    REPLICAS: "verify.replicas-differ",
    BUFFERS: "verify.buffers-differ",
    RANDOM: "verify.same-random-numbers",
    EVALUATION: "verify.evaluation-differs",
    BITWISE: "verify.bits-differ",
    COMPILED: "verify.compiled-differs",
    MODEL: "verify.other-model",
}
"""Clause → the code of the finding that it does not hold."""

GENERATORS = ("Generator", "Random", "RandomState")
"""Types of generators that a task may keep: torch's, NumPy's and Python's."""
OTHER_GENERATORS = ("random at", "numpy.random at")
"""The beginnings of a recorded location that draws from a generator other than torch's."""

ENDED_EARLY = "the run ended before this step"


@dataclass(frozen=True)
class Finding:
    """A rule of "the same training" that does not hold, and why."""

    rule: str
    observation: str
    likely_cause: str
    """Empty if it is unknown."""
    step: int
    """The first step in which it was observed."""
    tensor: str = ""

    @property
    def code(self) -> str:
        """The stable name of the finding, for example `verify.batch-norm`."""
        return RULE_CODES[self.rule]
