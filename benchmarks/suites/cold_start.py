"""Suite 7: time of a process before its first result: imports and compilation.

Every sample is a process that times itself, so that the start of the interpreter is excluded. A
first call is an edit's forward and backward on a [64, 256] hidden state, in a process that has
imported every module it names, on an initialized device. Modules that PyTorch's compiler imports
on first use belong to the call. ``first_call`` starts with empty compiler caches,
``first_call_cached`` with the caches that an earlier process filled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import reft_kernels
from benchmarks import edits
from benchmarks.harness import rows_of_samples, synchronize
from benchmarks.protocol import Case, RunSettings
from benchmarks.rows import Measurement

TITLE = "Cold start"
ABOUT = "seconds of imports, and of the first edit with empty and with filled compiler caches"
ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, RANK = 64, 256, 8
ROUNDS, LIMIT_SECONDS = 5, 600
IMPORTS = {
    "torch": "import torch",
    "reft_kernels": "import torch, reft_kernels",
    "transformers+peft": "import torch, transformers, peft",
    "transformers+peft tuner": "import torch, reft_kernels.integrations.peft",
}
EDITS = {
    "eager, unfolded": edits.eager_unfolded,
    "reft_kernels": reft_kernels.loreft,
    "torch.compile, folded": edits.eager_folded,
}
COMPILED = "torch.compile, folded"


def measure(settings: RunSettings) -> Iterator[list[Measurement]]:
    """Yield the rows of each case."""
    rounds = settings.rounds or (1 if settings.quick else ROUNDS)
    yield _rows("import", "torch", _imports(rounds, warm_up=not settings.quick), settings)
    cold, cached = _first_calls(
        rounds, settings.device, [name for name in EDITS if name != COMPILED or not settings.quick]
    )
    yield _rows("first_call", "eager, unfolded", cold, settings)
    yield _rows("first_call_cached", "eager, unfolded", cached, settings)


def first_call(name: str, device: str) -> None:
    """Print the seconds of this process's first edit."""
    hidden, grad = (
        torch.randn(ROWS, WIDTH, device=device, requires_grad=grad) for grad in (True, False)
    )
    R = torch.linalg.qr(torch.randn(WIDTH, RANK, device=device)).Q.mT.contiguous()
    leaves = [hidden, R, R + torch.randn_like(R) / WIDTH**0.5, torch.randn(RANK, device=device)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    synchronize(device)
    start = time.perf_counter()
    edit = torch.compile(EDITS[name], dynamic=False) if name == COMPILED else EDITS[name]
    torch.autograd.grad(edit(*leaves), leaves, grad)
    synchronize(device)
    print(time.perf_counter() - start)


def _imports(rounds: int, warm_up: bool) -> _Samples:
    """Time the import statements. The warm-up round fills the file cache."""
    samples = _Samples(IMPORTS)
    for number in range(-warm_up, rounds):
        for name, statement in IMPORTS.items():
            code = (
                f"import time; start = time.perf_counter(); {statement}; "
                "print(time.perf_counter() - start)"
            )
            samples.take(name, code, {}, keep=number >= 0)
    return samples


def _first_calls(rounds: int, device: str, names: list[str]) -> tuple[_Samples, _Samples]:
    cold, cached = _Samples(names), _Samples(names)
    for _ in range(rounds):
        for name in names:
            code = (
                f"from benchmarks.suites import cold_start; cold_start.first_call({name!r}, "
                f"{device!r})"
            )
            with tempfile.TemporaryDirectory() as folder:
                caches = {
                    "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                    "TRITON_CACHE_DIR": f"{folder}/triton",
                }
                for samples in (cold, cached):
                    samples.take(name, code, caches)
    return cold, cached


class _Samples:
    """Seconds by provider, and a note for each provider without samples."""

    def __init__(self, names: Iterable[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.notes: dict[str, str] = {}

    def take(self, name: str, code: str, environment: dict[str, str], keep: bool = True) -> None:
        """Run ``code``, which prints its seconds last, in a new process."""
        if name in self.notes:
            return
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        try:
            result = subprocess.run(
                [sys.executable, "-c", code],
                env=os.environ | threads | environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            self._give_up(name, f"took more than {LIMIT_SECONDS} s")
        except subprocess.CalledProcessError as error:
            self._give_up(
                name, f"failed: {(error.stderr.strip() or 'no message').splitlines()[-1]}"
            )
        else:
            if keep:
                self.seconds[name].append(float(result.stdout.split()[-1]))

    def _give_up(self, name: str, note: str) -> None:
        self.notes[name] = note
        del self.seconds[name]


def _rows(mode: str, baseline: str, samples: _Samples, settings: RunSettings) -> list[Measurement]:
    shape = (
        {"what": mode} if mode == "import" else {"what": mode, "rows": ROWS, "d": WIDTH, "r": RANK}
    )
    case = Case("cold_start", "start", shape, torch.float32, {}, baseline)
    return rows_of_samples(case, settings, samples.seconds, samples.notes)
