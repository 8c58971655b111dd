"""CUDA graphs hold no edit: proved on the compiled graph, divided as vLLM divides it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

LAYERS, WIDTH = 3, 6


class Block(nn.Module):
    """As the layers of vLLM: the sum of what it returns is the block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, residual):
        total = hidden + residual
        return torch.tanh(self.linear(total)), total


@pytest.fixture(scope="module")
def graph():
    """The graph of a model with edited layers, as Dynamo hands it to vLLM's backend."""
    from reft_kernels.serving.vllm.layers import patch_layers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

        def forward(self, hidden):
            residual = torch.zeros_like(hidden)
            for layer in self.layers:
                hidden, residual = layer(hidden, residual)
            return hidden + residual

    model, found = Model(), []
    patch_layers(dict(enumerate(model.layers)))

    def keep(module, inputs):
        found.append(module)
        return module.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=keep)(torch.randn(4, WIDTH))
    (module,) = found
    return module


def _edits(module) -> list:
    edit = torch.ops.reft_kernels_serving.edit
    nodes = [n for part in module.modules() if hasattr(part, "graph") for n in part.graph.nodes]
    return [n for n in nodes if n.target in (edit, edit.default)]


def _divided(graph, splitting_ops):
    import copy

    from vllm.compilation.backends import split_graph

    _, items = split_graph(copy.deepcopy(graph), splitting_ops)
    return items


def test_the_captured_pieces_hold_no_edit(graph):
    """vLLM captures the pieces that are not splitting ones, uniform decode steps included."""
    from vllm.config import CompilationMode, CUDAGraphMode

    from reft_kernels.serving.vllm import compatibility

    config = SimpleNamespace(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        splitting_ops=["vllm::unified_attention"],
    )
    compatibility.divide_graphs(config)
    assert not config.cudagraph_mode.has_full_cudagraphs()  # of whole steps, as of uniform decode
    items = _divided(graph, config.splitting_ops)
    captured = [item.graph for item in items if not item.is_splitting_graph]
    between = [item.graph for item in items if item.is_splitting_graph]
    assert len(_edits(graph)) == LAYERS == len(between)
    assert all(len(_edits(part)) == 1 for part in between)
    assert captured and not any(_edits(part) for part in captured)


def test_the_check_sees_an_edit_in_a_captured_piece(graph):
    (whole,) = _divided(graph, ["vllm::unified_attention"])
    assert not whole.is_splitting_graph and len(_edits(whole.graph)) == LAYERS
