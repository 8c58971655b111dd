"""Host time of an edit on the Triton path without a GPU: ``python -m benchmarks.host_path``.

CPU tensors take the place of GPU tensors, and Triton's C launcher is replaced by a function that
does nothing (:mod:`benchmarks.fake_gpu`). What remains is the work of the host: autograd, argument
checks, allocations and the choice of the compiled kernel. A chain of in-place edits, each with its
own weights, is compared with the same chain of ``add_``. Times are CPU seconds of the thread, so
that other processes on the machine affect them less. The result is printed as JSON: seconds of one
call by mode and provider, one for each round.

The native CPU library must not be loaded, because its operators would serve the CPU tensors; the
suite ``host_cost`` starts this module in that way.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from reft_kernels import host_calls, positions
from reft_kernels.arguments import EditWeights, RowSelection
from reft_kernels.autograd import apply_edit
from reft_kernels.operator_checks import as_built

TOKENS, WIDTH, RANK, LAYERS, CHAINS = 16, 64, 4, 20, 10
EDIT, ADD = "reft_kernels, Triton path, no-op launcher", "add_"
MODES = ("forward, no graph", "forward", "backward")
Chain = Callable[[Tensor], Tensor]


def _chain(step: Callable[[Tensor, int], Tensor]) -> Chain:
    def run(hidden: Tensor) -> Tensor:
        for layer in range(LAYERS):
            hidden = step(hidden, layer)
        return hidden

    return run


def _chains(requires_grad: bool) -> tuple[dict[str, Chain], list[Tensor]]:
    """Return the chains by provider, and the weights of the edits."""
    selection = RowSelection(positions.resolve("f7+l7", [TOKENS], TOKENS))
    weights, leaves = [], []
    for _ in range(LAYERS):
        R = torch.linalg.qr(torch.randn(WIDTH, RANK)).Q.mT.contiguous()
        tensors = [torch.randn(RANK, WIDTH), torch.randn(RANK), R]
        leaves += tensors
        W, b, R = (t.requires_grad_(requires_grad) for t in tensors)
        weights.append(as_built(EditWeights(W, b, R, None, True)))
    other = torch.randn(TOKENS, WIDTH)
    return {
        EDIT: _chain(lambda h, i: apply_edit(h, weights[i], selection, "linear", True)),
        ADD: _chain(lambda h, i: h.add_(other)),
    }, leaves


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return (time.thread_time() - start) / (CHAINS * LAYERS)


def _sample(mode: str, chain: Chain, leaf: Tensor, leaves: list[Tensor]) -> float:
    """Return the seconds of one call."""
    if mode == "forward, no graph":
        with torch.no_grad():
            inputs = [leaf * 1.0 for _ in range(CHAINS)]
            return _seconds(lambda: [chain(hidden) for hidden in inputs])
    inputs = [leaf * 1.0 for _ in range(CHAINS)]
    if mode == "forward":
        return _seconds(lambda: [chain(hidden) for hidden in inputs])
    losses = [chain(hidden).sum() for hidden in inputs]
    wanted = [leaf, *leaves]
    return _seconds(
        lambda: [torch.autograd.grad(loss, wanted, allow_unused=True) for loss in losses]
    )


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of one call by mode and provider, measured in turn."""
    from benchmarks import fake_gpu  # imports triton, which may be absent

    torch.manual_seed(0)
    torch.set_num_threads(1)
    samples: dict[str, dict[str, list[float]]] = {mode: {EDIT: [], ADD: []} for mode in MODES}
    with fake_gpu.installed() as gpu, fake_gpu.serving_cpu_tensors():
        gpu.launcher_cls = lambda src, metadata: lambda *arguments: None
        if host_calls.library is not None:
            host_calls.library.replace_driver(*host_calls.library.launch_nothing())
        leaf = torch.randn(TOKENS, WIDTH, requires_grad=True)
        for number in range(-2, rounds):  # the first rounds compile the kernels and warm up
            for mode in MODES:
                chains, leaves = _chains(mode != "forward, no graph")
                gc.collect()
                for name, chain in chains.items():
                    seconds = _sample(mode, chain, leaf, leaves if name == EDIT else [])
                    if number >= 0:
                        samples[mode][name].append(seconds)
    return samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_path", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    print(json.dumps(measure(parser.parse_args().rounds)))
