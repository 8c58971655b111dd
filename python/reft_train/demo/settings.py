"""What a training run is told: one frozen dataclass, which travels to worker processes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of the demo, as ``python -m reft_train demo --help`` tells them; ``layers`` is
    resolved to numbers.
    """

    model: str
    layers: list[int]
    rank: int
    positions: str
    epochs: int
    seed: int
    lr: float
    head_lr: float
    batch_size: int
    max_length: int
    device: str
    threads: int
    timing_steps: int

    def to_json(self) -> str:
        """For another process; see :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that :meth:`to_json` wrote."""
        return cls(**json.loads(text))
