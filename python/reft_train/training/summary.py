"""What a run says at its end, as a few lines of text."""

from __future__ import annotations

from pathlib import Path

from reft_train.methods import TITLES
from reft_train.training.outcome import Outcome


def _metrics(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def summary(outcome: Outcome) -> str:
    """Parameters, speed, memory, scores, and where the files are."""
    share = outcome.trainable / max(1, outcome.total)
    head = f" and {outcome.head:,} in the head" if outcome.head else ""
    lines = [
        f"{TITLES[outcome.config['method']]}: {outcome.trainable:,} trained numbers ({share:.4%} "
        f"of the model){head}",
        f"{outcome.steps:,} steps in {outcome.seconds:.0f} s: {outcome.step_seconds:.3g} s a step, "
        f"{outcome.tokens_per_second:,.0f} tokens a second, peak memory "
        f"{outcome.memory.peak:,.0f} MiB",
    ]
    if outcome.losses:
        lines.append(
            f"training loss {outcome.losses[0][1]:.4g} at step {outcome.losses[0][0]}, "
            f"{outcome.losses[-1][1]:.4g} at the end"
        )
    if outcome.orthonormality is not None:
        lines.append(f"max |R Rᵀ - I| = {outcome.orthonormality:.1e}")
    if outcome.validation:
        lines.append(f"held out: {_metrics(outcome.validation)}")
    lines += [f"{name}: {_metrics(values)}" for name, values in outcome.tests.items()]
    lines.append(f"written: {Path(outcome.config['output'])}")
    return "\n".join(lines)
