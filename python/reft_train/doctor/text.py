"""The doctor's findings as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from reft_train.doctor.estimate import Estimate
from reft_train.doctor.machine import Memory
from reft_train.doctor.trial import MEMORY_STEPS, Trial


def size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def estimate_lines(found: Estimate, batch: int, length: int) -> list[str]:
    """The estimate, part by part."""
    share = f"{found.trainable / found.model_numbers:.4%} of the model's {found.model_numbers:,}"
    lines = [
        f"memory for batches of {batch} x {length} tokens, estimated from the model's configuration"
    ]
    parts = [
        ("frozen weights", found.frozen, ""),
        ("trained weights", found.trained, f"{found.trainable:,} parameters ({share})"),
        ("gradients", found.gradients, ""),
        ("Adam's moments", found.optimizer, ""),
        ("activations", found.activations, ""),
        ("total", found.total, ""),
    ]
    if found.head:
        parts[1] = (*parts[1][:2], parts[1][2] + f" and {found.head:,} of a head")
    return lines + [
        f"  {name:<16}{size(count):>12}{'  ' + text if text else ''}" for name, count, text in parts
    ]


def verdict(found: Estimate, memory: Memory | None, device: str) -> str:
    """Whether the estimate fits, in a line."""
    if memory is None:
        return (
            f"the system does not tell how much memory the {device} has; the estimate is "
            f"{size(found.total)}"
        )
    have = f"{size(memory.free)} free of {size(memory.total)} ({memory.source})"
    if found.total <= memory.free:
        return f"fits: {size(found.total)} estimated, {have}"
    if found.total <= memory.total:
        return (
            f"does not fit now: {size(found.total)} estimated, {have}; other programs hold the rest"
        )
    return f"does not fit: {size(found.total)} estimated, {have}"


def remedy_lines(remedies: Sequence[tuple[str, Estimate]], memory: Memory) -> list[str]:
    """What to try, each with its estimate."""
    if not remedies:
        return [
            "hint: nothing in these settings can be made smaller; take a smaller model or a "
            "shorter --max-length"
        ]
    return [
        f"hint: {flags}: {size(found.total)}"
        + ("" if found.total <= memory.free else ", which does not fit either")
        for flags, found in remedies
    ]


def trial_lines(trial: Trial, found: Estimate) -> list[str]:
    """The trial's figures, or why it failed."""
    lines = [
        f"trial: {MEMORY_STEPS} + {trial.steps} training steps on random tokens, {trial.length} "
        "an example"
    ]
    if trial.left_out:
        lines.append(f"  without {', '.join(trial.left_out)}, which a trial leaves out")
    if trial.step_seconds is not None:
        lines += [
            f"  step, median           {trial.step_seconds * 1e3:,.1f} ms",
            f"  frozen model alone     {trial.frozen_seconds * 1e3:,.1f} ms, forward and backward "
            "on the same batches",
            f"  ratio, median          {trial.ratio:.3f}",
            f"  tokens per second      {trial.tokens_per_second:,.0f}",
            f"  memory over weights    {size((trial.peak.peak - trial.peak.before) * 2**20)}; "
            f"estimated {size(found.step)}",
            f"      peak {size(trial.peak.peak * 2**20)}: {trial.peak.method}",
            f"  loss                   {trial.losses[0]:.4f} first, {trial.losses[-1]:.4f} last",
        ]
        if trial.orthonormality is not None:
            lines.append(f"  max |R Rᵀ − I|         {trial.orthonormality:.2e}")
    lines.append("  all is well" if trial.failure is None else f"  FAILED: {trial.failure}")
    return lines
