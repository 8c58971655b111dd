"""A plain implementation of LoReFT: forward hooks, positions by loops, R from its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.families.family import Place

FIRST = LAST = 2
POSITIONS = f"f{FIRST}+l{LAST}"
_TIME = {"btd": 1, "btsd": 1, "tbd": 0, "sbtd": 2}


class Weights(NamedTuple):
    """Weights of one place: R ``[r, d]``, W ``[r, d]`` and b ``[r]``."""

    R: Tensor
    W: Tensor
    b: Tensor


def orthonormal(X: Tensor, signs: Tensor) -> Tensor:
    """R ``[r, d]`` from the lower triangle of X ``[d, r]``, by a product of reflections."""
    d, r = X.shape
    Q = torch.eye(d, r, dtype=X.dtype)
    for column in reversed(range(r)):
        v = torch.cat([X.new_zeros(column), X.new_ones(1), X[column + 1 :, column]])
        Q = Q - (2.0 / (v @ v)) * torch.outer(v, v @ Q)
    return Q.T * signs.to(X.dtype)[:, None]


def choose(tokens: Tensor) -> Tensor:
    """Mask of the first and last tokens of each prompt, at most half of it each.

    Args:
        tokens: bool ``[B, T]``, the prompt tokens.
    """
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    for row in range(tokens.shape[0]):
        columns = [c for c in range(tokens.shape[1]) if tokens[row, c]]
        half = len(columns) // 2
        for column in columns[: min(FIRST, half)] + columns[len(columns) - min(LAST, half) :]:
            chosen[row, column] = True
    return chosen


def grid(hidden: Tensor, layout: str) -> tuple[int, int]:
    """Batch size and sequence length of a hidden state."""
    if layout == "btd" and hidden.dim() == 2:
        return 1, hidden.shape[0]
    batch = {"btd": 0, "btsd": 0, "tbd": 1, "sbtd": 1}[layout]
    return hidden.shape[batch], hidden.shape[_TIME[layout]]


def edit(hidden: Tensor, chosen: Tensor, weights: Weights, layout: str) -> Tensor:
    """h + (h W^T + b - h R^T) R at the tokens ``chosen``, bool ``[B, T]``."""
    if layout == "btd":
        flags = chosen.reshape(-1) if hidden.dim() == 2 else chosen
        expected = hidden.shape[:-1]
    elif layout == "tbd":
        flags, expected = chosen.T, hidden.shape[:-1]
    elif layout == "btsd":
        flags, expected = chosen[:, :, None], (*hidden.shape[:2], 1)
    else:
        flags, expected = chosen[None], (1, *hidden.shape[1:3])
    assert tuple(flags.shape) == tuple(expected), (
        f"hidden state {tuple(hidden.shape)} ({layout}), tokens {tuple(chosen.shape)}"
    )
    R, W, b = weights
    edited = hidden + (hidden @ W.T + b - hidden @ R.T) @ R
    return torch.where(flags[..., None], edited, hidden)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def on_hidden(
    model: nn.Module, places: list[Place], change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Replace the hidden state at each place by ``change(index, hidden)``."""
    handles = []
    for index, (path, side) in enumerate(places):
        module = model.get_submodule(path)
        if side == "output":

            def hook(module: nn.Module, args: tuple, output: Any, index: int = index) -> Any:
                changed = change(index, _first(output))
                if isinstance(output, Tensor):
                    return changed
                return type(output)((changed, *output[1:]))

            handles.append(module.register_forward_hook(hook, prepend=True))
        else:

            def before(module: nn.Module, args: tuple, kwargs: dict, index: int = index) -> Any:
                if args:
                    return (change(index, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(index, kwargs["hidden_states"])}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def plain_edits(
    model: nn.Module,
    places: list[Place],
    weights: list[Weights],
    tokens: Tensor | None,
    layout: str = "btd",
    *,
    pads: bool = False,
    prompt_only: bool = False,
    choose: Callable[[Tensor], Tensor] = choose,
) -> Iterator[set[int]]:
    """Edit a model by plain hooks; yields the indices of the places that ran.

    Args:
        model: the base model.
        places: the places to edit.
        weights: the weights of each place.
        tokens: bool ``[B, T]``, the prompt tokens; None: all rows of the hidden state.
        layout: axes of the hidden states.
        pads: whether the model pads its hidden states on the right.
        prompt_only: whether later, shorter calls are decode steps, which are not edited.
        choose: returns the mask of the edited tokens for that of the prompt tokens.
    """
    ran: set[int] = set()
    widths: dict[int, int] = {}

    def change(index: int, hidden: Tensor) -> Tensor:
        ran.add(index)
        batch, width = grid(hidden, layout)
        prompt = torch.ones(batch, width, dtype=torch.bool) if tokens is None else tokens
        if prompt_only:
            if width < widths.setdefault(index, width):
                return hidden
            if tokens is None:
                prompt = prompt[:, : widths[index]]
        missing = width - prompt.shape[1]
        if missing > 0 and (pads or prompt_only) and hidden.dim() > 2:
            prompt = torch.nn.functional.pad(prompt, (0, missing))
        return edit(hidden, choose(prompt), weights[index], layout)

    with on_hidden(model, places, change):
        yield ran
