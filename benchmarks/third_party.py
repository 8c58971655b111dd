"""LoReFT by other packages, unmodified: pyreft 0.1.0 with pyvene 0.1.8, adapters 1.3.0, socket-lm.

All build R by ``torch.nn.utils.parametrizations.orthogonal``, which stores signs in the
parameter and truncates them to integers, so that any weight decay turns R into zeros after one
update. Every provider here therefore trains without weight decay. The packages are installed with
``requirements-pyreft.txt``, ``requirements-adapters.txt`` and ``requirements-socket-lm.txt`` in
this folder.
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
from benchmarks.models import PaddedBatch, Shape, Stepper, Weights
from benchmarks.protocol import Call, Provider, ProviderUnavailable

# other releases are treated as not installed
VERSIONS = {"pyreft": "0.1.0", "pyvene": "0.1.8", "adapters": "1.3.0", "socket-lm": "0.1.0"}
_MODULES = {"socket-lm": "socketimport"}  # imported under another name
_ADAPTER = "loreft"


def _package(name: str) -> ModuleType:
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ProviderUnavailable(f"{name} {VERSIONS[name]} is not installed") from None
    if installed != VERSIONS[name]:
        raise ProviderUnavailable(
            f"{name} {installed} is installed, expected {name} {VERSIONS[name]}"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # importing pyvene prints a message
            return importlib.import_module(_MODULES.get(name, name))
    except ImportError as error:
        root = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__
        raise ProviderUnavailable(f"{name} {installed} cannot be imported: {root}") from error


@torch.no_grad()
def _load(
    rotation: nn.Module, source: nn.Linear, weights: Sequence[Tensor], *, columns: bool
) -> None:
    """Set W and b of ``source``, and R as ``rotation.weight`` through its parametrization.

    With ``columns=True`` the weight is R^T.
    """
    R, W, b = weights
    rotation.weight = (R.mT if columns else R).to(rotation.weight)
    loaded = rotation.weight.mT if columns else rotation.weight
    error = float((R.to(loaded) - loaded).abs().max())
    if not error <= 1e-6:
        raise ValueError(f"R: got an error of {error:.1e} once set, expected orthonormal rows")
    source.weight.copy_(W)
    source.bias.copy_(b)


def pyreft_intervention(weights: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return pyreft's LoreftIntervention with given R, W ``[r, d]`` and b ``[r]``.

    The module edits every row of h ``[rows, d]``. W and b are stored in ``dtype``, R in fp32.

    Raises:
        ProviderUnavailable: If pyreft 0.1.0 or pyvene 0.1.8 is not installed.
        ValueError: If the rows of R are not orthonormal.
    """
    _package("pyvene")
    make, R = _package("pyreft").LoreftIntervention, weights[0]
    with R.device:  # the constructor factors a d x d matrix, which is slow on a CPU
        intervention = make(
            embed_dim=R.shape[1], low_rank_dimension=R.shape[0], dropout=0.0, dtype=dtype
        )
    _load(intervention.rotate_layer, intervention.learned_source, weights, columns=True)
    return intervention


def pyreft_edit(
    problems: Sequence[edits.Problem], mode: str, build: Callable[[], nn.Module]
) -> Provider:
    """Return a provider that runs the intervention from ``build`` on all rows.

    The backward computes gradients of h and of the parameters that training has.
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

    gate = functools.cache(lambda: edits.EditGate(problems[0], backward=False))
    return Provider(prepare, lambda: gate()(lambda h, *_: build()(h)))


def pyreft_model(model: nn.Module, weights: Weights) -> Any:
    """Return a ReftModel around ``model`` with LoReFT on the output of every layer.

    W and b have the model's dtype, R is in fp32.

    Raises:
        ProviderUnavailable, ValueError: As in :func:`pyreft_intervention`.
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
    """Return the training step of pyreft, optionally under ``accelerate_pyreft``.

    As in pyreft's ReftTrainer, positions are a tensor that is converted to nested lists in each
    step.
    """
    model = models.shallow_copy(model).train()
    reft_model = pyreft_model(model, weights)
    if accelerated:
        importlib.import_module("reft_kernels.integrations.pyreft").accelerate_pyreft(reft_model)
    interventions = [reft_model.interventions[key] for key in reft_model.sorted_keys]

    def loss(batch: PaddedBatch) -> Tensor:
        columns = batch.columns.expand(len(weights), -1, -1)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        units = {"sources->base": (None, columns.tolist())}
        return reft_model(inputs, unit_locations=units, labels=batch.labels)[1].loss

    trained = list(reft_model.get_trainable_parameters())
    return Stepper(
        loss, trained, lambda: [module.learned_source.weight.grad for module in interventions]
    )


def adapters_stepper(
    model: nn.Module, shape: Shape, weights: Weights, accelerated: bool = False
) -> Stepper:
    """Return the training step of adapters, optionally under ``accelerate_adapters``.

    adapters does not know where a prompt ends: its "l7" are the last 7 tokens of the attention
    mask, answer included. The number of edited rows is the same, so its time is comparable; its
    loss is compared with an edit of those tokens. Its orthogonal R fails in half precision, so
    there its parameters stay in fp32 and the forward runs under autocast. Generation is not
    measured: with a cache, adapters fails at the second token (index out of bounds); without one,
    it edits other tokens at every step.

    Raises:
        ProviderUnavailable: If adapters 1.3.0 is not installed or cannot express the positions.
        ValueError: If R is not reproduced to 1e-6.
    """
    adapters = _package("adapters")
    spec = re.fullmatch(r"f(\d+)\+l(\d+)", shape.spec)
    if not spec:
        raise ProviderUnavailable(f"adapters cannot express positions {shape.spec!r}")
    model = models.shallow_copy(model).train()
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

    def loss(batch: PaddedBatch) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return model(**batch.inputs).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    return Stepper(loss, trained, lambda: [unit.learned_source.weight.grad for unit in units])


def socket_model(model: nn.Module, shape: Shape, weights: Weights) -> Any:
    """Return socket-lm's ReFTAdapter around a copy of ``model``.

    socket-lm does not know where a prompt ends: its positions are the first and last tokens of the
    padded rows. The number of edited rows is the same, so its time is comparable; its loss is
    compared with an edit of those tokens.

    Raises:
        ProviderUnavailable: If socket-lm 0.1.0 is not installed or cannot express the positions.
        ValueError: If R is not reproduced to 1e-6.
    """
    socket = _package("socket-lm")
    spec = re.fullmatch(r"f(\d+)\+l(\d+)", shape.spec)
    if not spec:
        raise ProviderUnavailable(f"socket-lm cannot express positions {shape.spec!r}")
    model = models.shallow_copy(model)
    blocks = list(model.model.layers)
    config = socket.ReFTConfig(
        r=shape.rank,
        layers=tuple(range(len(blocks))),
        prefix_positions=int(spec[1]),
        suffix_positions=int(spec[2]),
    )
    adapter = socket.ReFTAdapter(model, blocks, shape.hidden, config=config).to(model.device)
    interventions = [adapter.interventions[str(number)] for number in range(len(blocks))]
    for module, layer in zip(interventions, weights, strict=True):
        _load(module.rotate_layer, module.learned_source, layer, columns=False)
    return adapter


def socket_stepper(model: nn.Module, shape: Shape, weights: Weights) -> Stepper:
    """Return the training step of socket-lm's ReFTAdapter; see :func:`socket_model`."""
    adapter = socket_model(model, shape, weights).train()
    interventions = adapter.interventions.values()
    return Stepper(
        lambda batch: adapter(**batch.inputs).loss,
        list(adapter.trainable_parameters()),
        lambda: [module.learned_source.weight.grad for module in interventions],
    )
