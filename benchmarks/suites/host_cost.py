"""Suite 6: host time and launches of one call of each public function.

Tensors are small, 14 rows of 64 with rank 4, so that host time dominates. On a GPU it is the
column ``host_us``, on a CPU the time itself. ``forward`` runs without gradients; ``both`` is
forward and backward.

The last cases measure the host's part of the Triton path without a GPU, beside ``add_``
(:mod:`benchmarks.host_path`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import reft_kernels as rk
from benchmarks import edits, harness, host_path
from benchmarks.protocol import Call, Case, Provider, RunSettings
from benchmarks.rows import Measurement
from reft_kernels.cpu import LIBRARY_VARIABLE

TITLE = "Host cost"
ABOUT = "microseconds and launches of one call of each public function on small tensors"
ROOT = Path(__file__).resolve().parents[2]
ROWS, WIDTH, RANK = 14, 64, 4
OWN, REFERENCE, EAGER = "reft_kernels", "reft_kernels, torch backend", "eager, unfolded"


def measure(settings: RunSettings) -> Iterator[list[Measurement]]:
    """Yield the rows of each case."""
    for case in cases(settings):
        if settings.wants(case):
            yield harness.measure(case, settings)
    if settings.device == "cpu":
        yield from _launches_nothing(settings)


def _launches_nothing(settings: RunSettings) -> Iterator[list[Measurement]]:
    """Yield the rows of an in-place edit on the Triton path with a launcher that does nothing."""
    shape = {"function": "in-place edit, no-op launcher"}
    wanted = [
        case
        for mode in host_path.MODES
        if settings.wants(case := Case("host_cost", mode, shape, torch.float32, {}, host_path.ADD))
    ]
    if not wanted:
        return
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment[LIBRARY_VARIABLE] = str(ROOT / "absent.so")  # not loaded, see host_path
    rounds = settings.rounds_or(Case.rounds)
    command = [sys.executable, "-m", "benchmarks.host_path", "--rounds", str(rounds)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        note = f"failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        for case in wanted:
            yield harness.rows_of_samples(case, settings, {}, {host_path.EDIT: note})
        return
    samples = json.loads(done.stdout.splitlines()[-1])
    for case in wanted:
        yield harness.rows_of_samples(case, settings, samples[case.mode], {})


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield every function, forward and with its gradients."""
    torch.manual_seed(0)
    for name, (function, tensors) in _functions(settings.device).items():
        for mode in ("forward", "both"):
            yield _case(name, function, tensors, mode)
    yield _resolve(settings.device)


def _functions(device: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    h, X = torch.randn(ROWS, WIDTH, device=device), torch.randn(WIDTH, RANK, device=device) / 8
    R, W, b = edits.weights(WIDTH, RANK, device)
    W2, scale, bias = (
        torch.randn_like(W),
        torch.randn(WIDTH, device=device),
        torch.randn(WIDTH, device=device),
    )
    return {
        "loreft": (rk.loreft, [h, R, W, b]),
        "direft": (rk.direft, [h, R, W, b]),
        "nodireft": (rk.nodireft, [h, W2, W, b]),
        "noreft": (rk.noreft, [h, W2, W, b]),
        "consreft": (rk.consreft, [h, R, b]),
        "lobireft": (rk.lobireft, [h, R, b]),
        "red": (rk.red, [h, scale, bias]),
        "householder": (rk.householder, [X]),
        "cayley": (rk.cayley, [X]),
    }


def _case(name: str, function: Callable[..., Tensor], tensors: list[Tensor], mode: str) -> Case:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        grad = torch.randn_like(function(*tensors))

    def provider(function: Callable[..., Tensor], backend: str | None = None) -> Provider:
        def forward(_: object) -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        run = (
            forward
            if mode == "forward"
            else lambda _: torch.autograd.grad(function(*leaves), leaves, grad)
        )
        return Provider(lambda _: edits.force_backend(backend, Call(run), tensors[0]))

    providers = {OWN: provider(function), REFERENCE: provider(function, "torch")}
    if name == "loreft":
        providers[EAGER] = provider(edits.eager_unfolded)
    return Case("host_cost", mode, {"function": name}, torch.float32, providers, REFERENCE)


def _resolve(device: str) -> Case:
    resolve = functools.partial(rk.positions.resolve, "f7+l7", [32] * 8, 64, device=device)
    providers = {OWN: Provider(lambda _: Call(lambda _: resolve(), capturable=False))}
    return Case(
        "host_cost", "forward", {"function": "positions.resolve"}, torch.int32, providers, OWN
    )
