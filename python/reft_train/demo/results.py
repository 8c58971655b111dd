"""What a variant's training gives, as numbers that another process can read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from reft_train.memory import Peak


@dataclass(frozen=True)
class Result:
    """One variant: trainable numbers, held-out accuracy, every step's loss, the training's
    seconds and memory.
    """

    name: str
    edit_count: int
    head_count: int
    accuracy: float
    losses: list[float]
    seconds: float
    memory: Peak

    def to_json(self) -> str:
        """For another process; see :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "memory": Peak(**fields["memory"])})


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of a step of the frozen reference and, by variant, of a step and of its
    ratio to the reference.
    """

    reference: float
    seconds: dict[str, float]
    ratios: dict[str, float]
    rounds: int
