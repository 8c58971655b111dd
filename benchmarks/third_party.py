"""LoReFT by other packages, unmodified from PyPI: pyreft 0.1.0 with pyvene 0.1.8, and AdapterHub's
adapters 1.3.0.

Both build R by ``torch.nn.utils.parametrizations.orthogonal``, which keeps signs in the parameter
and cuts them to integers, so that any weight decay turns R into zeros after one update; every
provider here trains without weight decay. How to install them:
``requirements-pyreft.txt`` and ``requirements-adapters.txt`` beside this file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import edits, models
from benchmarks.harness import Absent, Call, Provider
from benchmarks.models import Batch, Shape, Stepper, Weights

VERSIONS = {
    "pyreft": "0.1.0",
    "pyvene": "0.1.8",
    "adapters": "1.3.0",
}  # any other release counts as absent
_ADAPTER = "loreft"


def _package(name: str) -> ModuleType:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{name} {VERSIONS[name]} is not installed") from None
    if found != VERSIONS[name]:
        raise Absent(f"{name} {found} is installed: compared is {name} {VERSIONS[name]}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pyvene prints when it is imported
            return importlib.import_module(name)
    except ImportError as error:
        root = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__
        raise Absent(f"{name} {found} cannot be imported: {root}") from error


@torch.no_grad()
def _load(
    rotation: nn.Module, source: nn.Linear, weights: Sequence[Tensor], *, columns: bool
) -> None:
    """Set ``rotation.weight``, which is R^T where ``columns`` says so, through its
    parametrization; W and b of ``source``.
    """
    R, W, b = weights
    rotation.weight = (R.mT if columns else R).to(rotation.weight)
    loaded = rotation.weight.mT if columns else rotation.weight
    error = float((R.to(loaded) - loaded).abs().max())
    if not error <= 1e-6:
        raise ValueError(f"R: comes back with an error of {error:.1e}, expected orthonormal rows")
    source.weight.copy_(W)
    source.bias.copy_(b)


def pyreft_intervention(weights: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """pyreft's LoreftIntervention with given R, W ``[r, d]`` and b ``[r]``: ``module(h)`` edits
    every row of h ``[rows, d]``.

    W and b are kept in ``dtype``, R in fp32.

    Raises:
        Absent: no pyreft 0.1.0 or pyvene 0.1.8. ValueError: R's rows are not orthonormal.
    """
    _package("pyvene")
    make, R = _package("pyreft").LoreftIntervention, weights[0]
    with R.device:  # its constructor factors a d x d matrix
        intervention = make(
            embed_dim=R.shape[1], low_rank_dimension=R.shape[0], dropout=0.0, dtype=dtype
        )
    _load(intervention.rotate_layer, intervention.learned_source, weights, columns=True)
    return intervention


def pyreft_edit(
    problems: Sequence[edits.Problem], mode: str, build: Callable[[], nn.Module]
) -> Provider:
    """The bare intervention that ``build`` gives on all rows; gradients of h and of the
    parameters that training has.
    """

    def prepare(k: int) -> Call:
        intervention, problem = build(), problems[k]
        hidden = problem.hidden.detach().requires_grad_()
        leaves = [hidden, *intervention.parameters()]

        def forward(_: object) -> Tensor:
            with torch.no_grad():
                return intervention(problem.hidden)

        def backward(out: object) -> object:
            return torch.autograd.grad(out, leaves, problem.grad)

        if mode == "forward":
            return Call(forward)
        if mode == "backward":
            return Call(backward, lambda: intervention(hidden), capturable=False)
        return Call(lambda _: backward(intervention(hidden)))

    gate = functools.cache(lambda: edits.Gate(problems[0], backward=False))
    return Provider(prepare, lambda: gate()(lambda h, *_: build()(h)))


def pyreft_model(model: nn.Module, weights: Weights) -> Any:
    """A ReftModel around ``model``: LoReFT on the output of every layer, W and b in the model's
    dtype, R in fp32.

    Raises:
        Absent, ValueError: as :func:`pyreft_intervention`.
    """
    pyreft, training = _package("pyreft"), model.training
    representations = [
        {
            "layer": number,
            "component": "block_output",
            "intervention": pyreft_intervention(layer, model.dtype),
        }
        for number, layer in enumerate(weights)
    ]
    reft_model = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    model.train(training)
    return reft_model


def pyreft_stepper(
    model: nn.Module, shape: Shape, weights: Weights, accelerated: bool = False
) -> Stepper:
    """pyreft's training step, as it is or under ``accelerate_pyreft``.

    As in its ReftTrainer, positions come as a tensor and become nested lists in every step.
    """
    model = models.sharing(model).train()
    reft_model = pyreft_model(model, weights)
    if accelerated:
        importlib.import_module("reft_kernels.integrations.pyreft").accelerate_pyreft(reft_model)
    interventions = [reft_model.interventions[key] for key in reft_model.sorted_keys]

    def loss(batch: Batch) -> Tensor:
        columns = batch.columns.expand(len(weights), -1, -1)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        units = {"sources->base": (None, columns.tolist())}
        return reft_model(inputs, unit_locations=units, labels=batch.labels)[1].loss

    trained = list(reft_model.get_trainable_parameters())
    return Stepper(loss, trained, lambda: [own.learned_source.weight.grad for own in interventions])


def adapters_stepper(
    model: nn.Module, shape: Shape, weights: Weights, accelerated: bool = False
) -> Stepper:
    """adapters' training step, as it is or under ``accelerate_adapters``.

    It knows no prompts: "l7" are the last 7 tokens of the attention mask, answer included. As many
    rows are edited as in the prompt's reading, so its time compares; its loss compares with an edit
    of those tokens. Its orthogonal R fails in half precision; there its parameters stay fp32 and
    the forward runs under autocast. It has no generation here: with a cache it fails at the second
    token (an index out of bounds), without one it edits other tokens at every step.

    Raises:
        Absent: no adapters 1.3.0, or positions that it cannot express. ValueError: an R that does
            not come back to 1e-6.
    """
    adapters = _package("adapters")
    spec = re.fullmatch(r"f(\d+)\+l(\d+)", shape.spec)
    if not spec:
        raise Absent(f"adapters cannot express positions {shape.spec!r}")
    model = models.sharing(model).train()
    device, dtype = model.device, model.dtype
    adapters.init(model)
    config = adapters.LoReftConfig(
        layers="all",
        prefix_positions=int(spec[1]),
        suffix_positions=int(spec[2]),
        r=shape.rank,
        tied_weights=True,
        dropout=0.0,
    )
    model.add_adapter(_ADAPTER, config=config)
    model.train_adapter(_ADAPTER)
    model.to(device).train()
    units = [
        layer.reft_layer.refts[_ADAPTER].units[0] for _, layer in model.base_model.iter_layers()
    ]
    for unit, layer in zip(units, weights, strict=True):
        _load(unit.projection, unit.learned_source, layer, columns=False)
    if accelerated:
        importlib.import_module("reft_kernels.integrations.adapters").accelerate_adapters(model)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return model(**batch.inputs).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    return Stepper(loss, trained, lambda: [unit.learned_source.weight.grad for unit in units])
