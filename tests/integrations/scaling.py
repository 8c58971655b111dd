"""Models, coefficients and plain hooks for the tests of ``subspaces`` and ``strengths``."""

from __future__ import annotations

import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, blocks, make, shake, stacks

RANK = 4
SUBSPACES = [[0, 2], None, [3]]
STRENGTHS = [0.5, -1.0, 2.5]


def build(family="llama", *, seed=7, **config):
    model = get_peft_model(make(family), ReftConfig(**{"rank": RANK, "init": None, **config}))
    shake(model, 0.5, seed)
    return model.eval()


def tokens_of(family="llama", side="right"):
    return {k: v for k, v in batch(family, side=side).items() if k != "labels" or family == "t5"}


def logits(model, inputs, **call):
    with torch.no_grad():
        return model(**inputs, **call).logits


def table(subspaces, strengths, rank=RANK, count=3):
    """The coefficients ``[count, rank]`` in fp64, by plain loops."""
    made = torch.ones(count, rank, dtype=torch.float64)
    for row in range(count):
        if subspaces is not None and subspaces[row] is not None:
            made[row] = torch.tensor([float(c in subspaces[row]) for c in range(rank)])
        made[row] *= 1.0 if strengths is None else strengths[row]
    return made


def plain_edit(h, coeff, sets, name, weight_set):
    """The edit of hidden states ``[n, d]`` with one coefficient vector ``[r]``, by its formula."""
    w = {
        k: (v if v is None else v[weight_set] if v.dim() == sets[k] else v) for k, v in name.items()
    }
    if "scale" in w:
        return h + coeff[0] * (w["scale"] * h + w["bias"] - h)
    update = h @ w["W"].T + w["b"] if w["W"] is not None else w["b"].expand(len(h), -1)
    if w["subtract"] is not None:
        update = update - h @ w["R"].T
    return h + (coeff * update) @ w["R"]


def plain_weights(stack, layer, dtype):
    """The tensors of one layer's formula and the number of their dimensions with weight sets."""
    kind = type(stack).__name__.removeprefix("Stacked")
    if kind == "RED":
        found = {"scale": stack.scale[layer], "bias": stack.bias[layer]}
        return {k: v.detach().to(dtype) for k, v in found.items()}, {"scale": 2, "bias": 2}
    reads = kind not in ("ConsReFT", "LobiReFT")
    free = kind in ("NodiReFT", "NoReFT")
    read = (stack.W1 if free else stack.W)[layer] if reads else None
    found = {
        "W": read,
        "b": (stack.b if reads else stack.s)[layer],
        "R": stack.W2[layer] if free else stack.R[layer],
        "subtract": torch.ones(()) if kind in ("LoReFT", "NoReFT", "ConsReFT") else None,
    }
    found = {k: v if v is None else v.detach().to(dtype) for k, v in found.items()}
    return found, {"W": 3, "b": 2, "R": 3, "subtract": -1}


class Plain:
    """Plain hooks on a frozen model: gathers, edits by the formula, scatters."""

    def __init__(self, family, stack, columns, coeff, dtype, first=0):
        self.model = make(family).to(dtype)
        self.columns, self.coeff, self.first = columns, coeff.to(dtype), first
        for layer, block in enumerate(blocks(family, self.model)):
            block.register_forward_hook(self.hook(*plain_weights(stack, layer, dtype)))

    def hook(self, weights, sets):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            edited = hidden.clone()
            for row, chosen in enumerate(self.columns):
                for number, column in enumerate(chosen):
                    last = int(number >= self.first)
                    h = hidden[row, [column]]
                    edited[row, [column]] = plain_edit(h, self.coeff[row], sets, weights, last)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook


def expected(family, model, inputs, columns, coeff, first=0):
    """Logits of the plain hooks in fp32 and in fp64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        plain = Plain(family, stacks(model)[0], columns, coeff, dtype, first)
        results.append(logits(plain.model, inputs))
    return results
