"""pyreft models of tiny random transformers, and the error budget against pyreft.

The straightforward computation is pyreft in the model's dtype, the reference pyreft in fp64. An
accelerated model's error may be at most twice that of pyreft, plus one rounding.
"""

from __future__ import annotations

import copy

import pyreft
import torch

from reft_kernels.integrations.pyreft import accelerate_pyreft
from tests.model.families import LAYERS, WIDTH, batch, make

RANK = 4
CLASSES = {
    "loreft": (pyreft.LoreftIntervention, {}),
    "loreft-gelu": (pyreft.LoreftIntervention, {"act_fn": "gelu"}),
    "noreft": (pyreft.NoreftIntervention, {"add_bias": True}),
    "noreft-silu": (pyreft.NoreftIntervention, {"add_bias": False, "act_fn": "silu"}),
    "consreft": (pyreft.ConsreftIntervention, {}),
    "lobireft": (pyreft.LobireftIntervention, {}),
    "direft": (pyreft.DireftIntervention, {}),
    "direft-tanh": (pyreft.DireftIntervention, {"act_fn": "tanh"}),
    "nodireft": (pyreft.NodireftIntervention, {"add_bias": True}),
    "nodireft-relu": (pyreft.NodireftIntervention, {"add_bias": False, "act_fn": "relu"}),
}


def move(reft_model, scale=0.2, seed=7):
    """Change every trained parameter from its initial value.

    The diagonal of ``original`` is kept, because pyreft truncates it and would zero columns of R.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reft_model.interventions.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.tril(-1) if name.endswith("original") else noise)


def build(
    kind="loreft",
    *,
    dtype=torch.float32,
    family="llama",
    per_layer=1,
    component="block_output",
    rank=RANK,
    moved=True,
    classes=CLASSES,
    **more,
):
    cls, keywords = classes[kind]
    model = make(family).to(dtype)
    torch.manual_seed(3)
    representations = [
        {
            "layer": layer,
            "component": component.format(layer) if "." in component else component,
            "low_rank_dimension": rank,
            "intervention": cls(
                embed_dim=WIDTH, low_rank_dimension=rank, dtype=dtype, **keywords, **more
            ),
        }
        for _ in range(per_layer)
        for layer in range(LAYERS)
    ]
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    if moved:
        move(reft_model)
    return reft_model


def inputs(family="llama", seed=1, side="right"):
    base = batch(family, seed, side)
    return base, base.pop("labels")


def tied(count=LAYERS, *, repeats=True):
    """Return the same positions for each intervention.

    With ``repeats``, the second and third example are padded with column 0.
    """
    columns = (
        [[1, 2, 3, 17], [0, 0, 5, 11], [0, 0, 0, 4]]
        if repeats
        else [[1, 2, 3, 17], [0, 4, 5, 11], [1, 2, 3, 8]]
    )
    return {"sources->base": (None, [[list(c) for c in columns] for _ in range(count)])}


def untied():
    """Return positions that differ between the interventions.

    The first half of the interventions has prefix positions, the second suffix positions. They
    overlap in column 3 and in the padding column.
    """
    prefix, suffix = [[1, 2, 3], [0, 1, 2], [0, 0, 1]], [[3, 16, 17], [0, 10, 11], [0, 0, 8]]
    return {"sources->base": (None, [prefix] * LAYERS + [suffix] * LAYERS)}


def step(reft_model, base, unit_locations, labels):
    """Return the logits and every gradient of one forward and backward."""
    reft_model.zero_grad()
    _, out = reft_model(base, unit_locations=unit_locations, labels=labels)
    out.loss.backward()
    results = {"logits": out.logits.detach()}
    for key, intervention in reft_model.interventions.items():
        results |= {
            f"{key}.{name}": p.grad
            for name, p in intervention.named_parameters()
            if p.grad is not None
        }
    return results


def hold(build_model, unit_locations, *, family="llama", side="right", draws=16):
    """Check a model against the budget over several batches."""
    plain = build_model()
    exact = copy.deepcopy(plain)
    exact.model.double(), exact.interventions.double()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    worst: dict[str, list[float]] = {}
    for seed in range(draws):
        base, labels = inputs(family, seed, side)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in base.items()}
        results = []
        for model, given in ((exact, wide), (plain, base), (fast, base)):
            torch.manual_seed(seed)
            results.append(step(model, given, unit_locations, labels))
        truth, theirs, ours = results
        assert ours.keys() == theirs.keys() == truth.keys()
        for name, want in truth.items():
            assert (
                ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
            ), name
            errors = [float((t[name].double() - want).abs().max()) for t in (ours, theirs)]
            numbers = [*errors, torch.finfo(ours[name].dtype).eps * float(want.abs().max())]
            worst[name] = [
                max(pair) for pair in zip(worst.get(name, numbers), numbers, strict=True)
            ]
    for name, (error, straightforward, rounding) in worst.items():
        assert error <= 2 * straightforward + rounding, (
            f"{name}: {error:.2e}, pyreft {straightforward:.2e} + {rounding:.2e}"
        )
    return worst
