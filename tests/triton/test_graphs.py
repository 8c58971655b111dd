"""Backward passes under CUDA graphs: a replay needs nothing that another graph has done.

Two captures are replayed in both orders, and after a capture that is discarded. On the CPU a
stand-in records the launches (:mod:`tests.triton.capture`); with a GPU, CUDA graphs are used.
"""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from reft_kernels import reference
from reft_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="needs the package triton")

backward = importlib.import_module("reft_kernels.triton.edit_backward")
gradient = importlib.import_module("reft_kernels.triton.edit_gradient")
red = importlib.import_module("reft_kernels.triton.red")

ROWS, D, RANK = 40, 20, 3


class _Edit:
    """A backward pass of an edit with several chunks of rows, and its expected gradients."""

    def __init__(self, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.grad, self.y = (torch.randn(ROWS, D, device=device) for _ in range(2))
        self.out = torch.empty_like(self.grad)
        self.u = torch.randn(ROWS, RANK, device=device)
        self.read, self.write = (torch.randn(RANK, D, device=device) / 4 for _ in range(2))

    def _arguments(self) -> tuple:
        z = self.grad.new_empty(0)
        weights = (None, None, self.read, self.write, None)
        return (self.grad, self.out, self.y, self.u, z, *weights, True, "linear", True)

    def run(self) -> None:
        self.results = (*backward.edit_backward(*self._arguments())[:4], self.out)

    def expected(self):
        out = torch.empty_like(self.grad)
        arguments = list(self._arguments())
        arguments[1] = out
        return (*reference.edit_backward(*arguments)[:4], out)


class _Red:
    """The same for RED."""

    def __init__(self, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.grad, self.x = (torch.randn(ROWS, D, device=device) for _ in range(2))
        self.out = torch.empty_like(self.grad)
        self.scale = torch.randn(D, device=device)

    def run(self) -> None:
        sums = red.red_backward(self.grad, self.out, self.x, None, None, self.scale, True)
        self.results = (*sums, self.out)

    def expected(self):
        out = torch.empty_like(self.grad)
        sums = reference.red_backward(self.grad, out, self.x, None, None, self.scale, True)
        return (*sums, out)


@pytest.fixture(params=[_Edit, _Red], ids=["edit", "red"])
def calls(request, monkeypatch):
    """Three calls with several chunks each."""
    for module, name in ((gradient, "gradient_config"), (red, "red_config")):
        config = getattr(module, name)

        def three_chunks(*args, config=config):
            return dataclasses.replace(config(*args), block_n=16, chunks=3)

        monkeypatch.setattr(module, name, three_chunks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [request.param(seed, device) for seed in range(3)]


def _check(call) -> None:
    for got, want in zip(call.results, call.expected(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _spoil(call) -> None:
    for tensor in call.results:
        tensor.fill_(float("nan"))


def _replay_in_both_orders(graphs, calls) -> None:
    for order in ((1, 0), (0, 1), (1, 1)):
        for k in order:
            _spoil(calls[k])
            graphs[k].replay()
            _check(calls[k])


@pytest.mark.skipif(not interpreting(), reason="needs the Triton interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("discarded", [False, True])
def test_recorded_captures_are_independent(calls, discarded):
    from tests.triton.capture import Capture

    if discarded:
        with Capture():
            calls[2].run()
    graphs = []
    for call in calls[:2]:
        with Capture() as graph:
            call.run()
        assert len(graph.launches) == 2, graph.launches
        assert all(bool(t.isnan().all()) for t in call.results[:-1]), "the capture ran a kernel"
        graphs.append(graph)
    _replay_in_both_orders(graphs, calls)


@pytest.mark.skipif(not interpreting(), reason="needs the Triton interpreter (TRITON_INTERPRET=1)")
def test_two_graphs_may_overlap(calls):
    """The launches of two graphs are interleaved, as on two streams."""
    from tests.triton.capture import Capture

    graphs = []
    for call in calls[:2]:
        with Capture() as graph:
            call.run()
        graphs.append(graph)
    for first, second in zip(*(graph._recorded for graph in graphs), strict=True):
        for function, args, kwargs in (first, second):
            function(*args, **kwargs)
    for call in calls[:2]:
        _check(call)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("discarded", [False, True])
def test_cuda_graphs_are_independent(calls, discarded):
    calls[2].run()  # compiles
    if discarded:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            calls[2].run()
    graphs = []
    for call in calls[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.run()
        graphs.append(graph)
    _replay_in_both_orders(graphs, calls)
    torch.cuda.synchronize()
