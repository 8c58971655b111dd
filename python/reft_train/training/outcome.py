"""What a run gives, as numbers that other commands and other processes read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reft_train.errors import UserError
from reft_train.files import write_text
from reft_train.memory import Peak
from reft_train.reporting.strict_json import dumps

RESULTS = "results.json"


@dataclass(frozen=True)
class Outcome:
    """A finished (or interrupted) training.

    Attributes:
        config: the settings. trainable: numbers trained in the method, head excluded. head: numbers
            of a new head.
        total: the frozen model's numbers. steps: optimizer steps. losses: (step, mean loss since
            the last line) pairs.
        validation: metrics on held-out training rows, by name. tests: metrics of each test set.
        seconds: of training. step_seconds: median of an optimizer step. tokens_per_second: real
        tokens, padding excluded.
        orthonormality: max |R R^T - I| at the end; None where there is no R. interrupted: Ctrl-C
            came before the end.
    """

    config: dict[str, Any]
    trainable: int
    head: int
    total: int
    steps: int
    losses: list[tuple[int, float]]
    seconds: float
    step_seconds: float
    tokens_per_second: float
    memory: Peak
    validation: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[str, float]] = field(default_factory=dict)
    orthonormality: float | None = None
    interrupted: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write ``results.json``."""
        return write_text(folder / RESULTS, dumps(asdict(self)))

    @classmethod
    def load(cls, folder: str | Path) -> Outcome:
        """The outcome that a run left in its folder.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = Path(folder) / RESULTS
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            losses = [(int(step), float(loss)) for step, loss in fields["losses"]]
            return cls(**{**fields, "memory": Peak(**fields["memory"]), "losses": losses})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"run: got {folder}, without a readable {RESULTS} ({error}), expected a finished "
                "run"
            ) from None
