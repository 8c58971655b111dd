"""``doctor``: environment report, memory estimate for a model, and a short trial training."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from reft_kernels import cpu, env
from reft_kernels.version import __version__
from reft_train import flags, models, tasks
from reft_train.config import RunConfig
from reft_train.doctor.estimate import estimate
from reft_train.doctor.trial import run_trial
from reft_train.errors import wrong
from reft_train.files import dumps, write_text
from reft_train.reporting import installed

NEEDED_FOR = {
    "torch": "everything",
    "triton": "the Triton kernels on GPUs",
    "transformers": "every command",
    "peft": "every command",
    "accelerate": "training",
    "datasets": "Parquet files and training data",
    "safetensors": "weights and adapters",
    "pydantic": "settings",
    "matplotlib": "loss.png and report.html",
    "rich": "tables",
    "scikit-learn": "scores of GLUE tasks",
    "optuna": "search",
    "bitsandbytes": "--quantization 8bit and 4bit",
    "liger-kernel": "--liger",
    "deepspeed": "--deepspeed",
    "tensorboard": "TensorBoard logs",
}
_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, and the source of the numbers."""

    free: int
    total: int
    source: str


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 when memory is insufficient or the trial failed."""
    if parsed.json is not None and Path(parsed.json).is_dir():
        raise wrong("--json", f"{parsed.json}, which is a folder", "a file")
    config = None
    if parsed.config is not None or "model" in parsed:
        config = flags.settings(parsed)
    elif extra := sorted(flags.passed(parsed), key="task".__eq__):
        name = extra[0].replace("_", "-")
        raise wrong("--model", f"none with --{name}", "a model's folder or hub name")
    report: dict[str, Any] = {"environment": environment()}
    code = 0 if config is None else _examine(config, parsed.trial_steps, report)
    if parsed.json is not None:
        print(f"written: {write_text(Path(parsed.json), dumps(report))}")
    return code


def environment() -> dict[str, Any]:
    """Print the environment and return it as plain values.

    ``backends`` gives the backend of each operator by device, and why others are unavailable.
    """
    devices = dict(env.devices())
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "reft_kernels": __version__,
        "packages": {name: installed(name) for name in NEEDED_FOR},
        "devices": devices,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "backends": {n: {"serving": env.serving(n), "off": env.unable(n)} for n in devices},
    }
    print("\nreft_kernels {reft_kernels}, Python {python}, {platform}".format(**found))
    for name, version in found["packages"].items():
        purpose = f", needed for {NEEDED_FOR[name]}" if version == "not installed" else ""
        print(f"  {name:<14}{version}{purpose}")
    text = "  CPU: {cores} cores, {threads} threads, instruction set {instruction_set}"
    print(text.format(**found), *env.backend_lines(), sep="\n", flush=True)
    return found


def memory_of(device: str, spread: bool = False) -> Memory:
    """Return the memory of ``cpu`` or ``cuda`` (``spread``: of all GPUs)."""
    if device == "cuda":
        numbers = range(torch.cuda.device_count()) if spread else [torch.cuda.current_device()]
        free, total = map(sum, zip(*map(torch.cuda.mem_get_info, numbers), strict=True))
        return Memory(free, total, f"CUDA, {len(numbers)} device(s)")
    found = psutil.virtual_memory()
    for paths in _GROUPS:
        try:
            limit, used = (int(path.read_text()) for path in paths)
        except (OSError, ValueError):  # no such file, or "max" for no limit
            continue
        if limit < found.total:
            free = min(found.available, max(0, limit - used))
            return Memory(free, limit, "the control group's limit")
    return Memory(found.available, found.total, "system memory")


def size(count: float) -> str:
    units = (("GiB", 2**30), ("MiB", 2**20))
    unit, factor = next((pair for pair in units if count >= pair[1]), ("KiB", 2**10))
    return f"{count / factor:,.2f} {unit}"


def _examine(config: RunConfig, steps: int, report: dict[str, Any]) -> int:
    """Print and report the estimate, the machine's memory and the trial."""
    task, device = tasks.get(config.task), models.pick_device(config)
    needed = estimate(config, task)
    memory = memory_of(device, spread=config.device_map == "auto")
    report["settings"] = config.to_dict()
    report["estimate"] = {**asdict(needed), "total": needed.total}
    report["memory"] = {"device": device, **asdict(memory)}
    share = f"{needed.trainable / needed.model_numbers:.4%} of the model's {needed.model_numbers:,}"
    head = f" and {needed.head:,} of a head" if needed.head else ""
    moments = f"with gradients and Adam's moments {size(4 * needed.trained)}"
    enough = needed.total <= memory.free
    free = f"{size(memory.free)} free of {size(memory.total)} ({memory.source})"
    report["verdict"] = f"{'fits' if enough else 'does not fit'}: {free}"
    lines = [
        "\nmemory estimated from the model's configuration, without activations",
        f"  frozen weights         {size(needed.frozen)}",
        f"  trained weights        {size(needed.trained)}, {moments}",
        f"  trained parameters     {needed.trainable:,} ({share}){head}",
        f"  total                  {size(needed.total)}",
        report["verdict"],
    ]
    print(*lines, sep="\n", flush=True)
    if needed.length < config.max_length:
        limit = f"the model reads {needed.length} tokens"
        print(f"{limit}, fewer than --max-length {config.max_length}")
    if not enough:
        print("hint: --quantization 4bit (with a GPU), --dtype bfloat16, or a smaller model")
    if not enough or not steps:
        return int(not enough)
    print(f"\nloading {config.model} for a trial", file=sys.stderr)
    trial = run_trial(config, task, steps, needed.length)
    report["trial"] = asdict(trial)
    print(f"\ntrial: {steps} training steps on random text, {trial.length} tokens an example")
    if trial.outcome is not None:
        alone = f"{trial.frozen_seconds * 1e3:,.1f} ms, forward and backward"
        facts = {"frozen model alone": alone, "ratio": f"{trial.ratio:.3f}"}
        for name, text in (trial.outcome.figures() | facts).items():
            print(f"  {name}: {text}")
    print(f"  FAILED: {trial.failure}" if trial.failure else "  passed", flush=True)
    return 0 if trial.failure is None else 1
