"""Results of a run: numbers for other commands, and a text summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_train.files import dumps, read_json, write_text
from reft_train.memory import Peak

RESULTS = "results.json"


@dataclass(frozen=True)
class Outcome:
    """A finished or interrupted training.

    Attributes:
        trainable: trainable parameters of the method, without the head.
        total: parameters of the frozen model.
        losses: (step, mean loss since the previous log entry) pairs.
        validation: held-out metrics by name.
        tests: metrics of each test set.
        step_seconds: median time of an optimizer step.
        tokens_per_second: throughput without padding.
        orthonormality: max |R R^T - I|; None without R.
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
        return write_text(folder / RESULTS, dumps(self))

    def summary(self) -> str:
        """Format the measurements, scores and file locations as text."""
        share, error = self.trainable / max(1, self.total), self.orthonormality
        before = f"{self.memory.before:,.0f} MiB of it before training"
        entries = {
            "method": self.config["method"],
            "trained parameters": f"{self.trainable:,} ({share:.4%} of the model's {self.total:,})",
            "trained parameters of the head": f"{self.head:,}" if self.head else "",
            "optimizer steps": f"{self.steps:,}" + (", interrupted" if self.interrupted else ""),
            "training time": f"{self.seconds:,.1f} s",
            "time of a step, median": f"{self.step_seconds:.4g} s",
            "tokens per second, padding excluded": f"{self.tokens_per_second:,.0f}",
            "peak memory": f"{self.memory.peak:,.0f} MiB, {before}",
            "measured as": self.memory.method,
            "max |R Rᵀ − I| at the end": "" if error is None else f"{error:.2e}",
        }
        if self.losses:
            (first, loss), (_, final) = self.losses[0], self.losses[-1]
            entries["training loss"] = f"{loss:.4g} at step {first}, {final:.4g} at the end"
        for name, metrics in {"held out": self.validation, **self.tests}.items():
            entries[name] = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        entries["written"] = str(Path(self.config["output"]))
        return "\n".join(f"{name}: {text}" for name, text in entries.items() if text)

    @classmethod
    def load(cls, folder: str | Path) -> Outcome:
        """Load the outcome saved in a run's folder."""
        return read_json(Path(folder) / RESULTS, cls, "run")
