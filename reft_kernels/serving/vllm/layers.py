"""Decoder layers of a served model, and the patch that edits their output.

vLLM's decoder layers return (hidden, residual), whose sum is the block's output; the next layer, or
the last norm, adds them. The layers are found by their signature, whatever the architecture, and
get a class of their own, derived from theirs, so that other models in the process are not changed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.vllm import operator

_edit = torch.ops.reft_kernels_serving.edit


def find_layers(model: nn.Module, count: int) -> dict[int, nn.Module]:
    """Return the decoder layers that this process holds, by number.

    Args:
        model: The loaded model.
        count: Number of layers of the whole model.

    Raises:
        AdapterError: If there is no list of that many layers, several, or layers of another form.
    """
    found: list[tuple[str, nn.ModuleList, list[nn.Module]]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            held = [layer for layer in module if type(layer).__name__ != "PPMissingLayer"]
            found.append((path, module, held))
    layers = [entry for entry in found if entry[2] and all(map(_takes_residual, entry[2]))]
    if len(layers) != 1:
        names = {f"{p} ({type(h[0]).__name__})" for p, _, h in (layers or found) if h}
        what = f"several lists of them: {sorted(names)}" if layers else f"{sorted(names) or 'none'}"
        raise AdapterError(
            f"{type(model).__name__}: expected one list of {count} decoder layers that take and "
            f"return (hidden, residual), got {what}; ReFT adapters cannot be served on this model"
        )
    _, listed, held = layers[0]
    for layer in held:
        _check_returns(type(layer))
    return {i: layer for i, layer in enumerate(listed) if layer in held}


def _takes_residual(layer: nn.Module) -> bool:
    return "residual" in inspect.signature(type(layer).forward).parameters


def _check_returns(cls: type[nn.Module]) -> None:
    """Raise AdapterError if the source of a layer's forward returns something other than a pair."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):  # no source: checked when the layer runs
        return
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    for value in returns:
        if not isinstance(value, ast.Tuple) or len(value.elts) == 2:
            continue
        raise AdapterError(
            f"{cls.__name__}: its forward returns {len(value.elts)} values, expected (hidden, "
            "residual); ReFT adapters cannot be served on this model"
        )


def patch_layers(layers: dict[int, nn.Module]) -> None:
    """Make layers edit their output; the index of a layer is its place in the dictionary."""
    for index, layer in enumerate(layers.values()):
        layer.reft_index = index  # type: ignore[assignment]
        cls: Any = type(layer)
        layer.__class__ = _edited_class(cls)


@functools.cache
def _edited_class(cls: Any) -> type[nn.Module]:
    forward_of_layer = cls.forward

    @functools.wraps(forward_of_layer)
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = forward_of_layer(self, *args, **kwargs)
        if not isinstance(out, tuple) or len(out) != 2 or out[0].shape != out[1].shape:
            raise AdapterError(
                f"{cls.__name__}: its forward returned something other than (hidden, residual) of "
                "one shape; ReFT adapters cannot be served on this model"
            )
        if torch.compiler.is_compiling() or operator.has_step():
            _edit(out[0], out[1], self.reft_index)
        return out

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
