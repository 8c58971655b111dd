"""Adapters in the form in which they are served.

Every low-rank edit of the family becomes

    y = h + B^T (coeff * (act(A h + c) - B h))      with or without the subtracted B h

and with a linear activation, or none that depends on h, the subtraction is folded into A, so that
all those adapters share one form and one kernel launch:

    y = h + B^T (coeff * (A h + c))

    LoReFT    A = W - R     c = b           B = R
    DiReFT    A = W         c = b           B = R
    NoReFT    A = W1 - W2   c = b - b2      B = W2
    NodiReFT  A = W1        c = b           B = W2
    ConsReFT  A = -R        c = act(s)      B = R
    LobiReFT  A = 0         c = act(s)      B = R
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels import base_model, convert
from reft_kernels import positions as positions_module
from reft_kernels.activations import activate
from reft_kernels.adapter_files import ConversionError, read_json, read_safetensors
from reft_kernels.base_model import Fingerprint
from reft_kernels.conversion import peft_folder
from reft_kernels.conversion.common import Options, SavedAdapter, Weights, fold_subtract_bias
from reft_kernels.positions import Spec
from reft_kernels.serving.errors import AdapterError

COMPONENT = "block_output"
_TARGET = "the served form"


class Form(NamedTuple):
    """What adapters must have in common to be served by one kernel launch."""

    activation: str = "linear"
    subtract_projection: bool = False


@dataclasses.dataclass(frozen=True)
class ServedAdapter:
    """An adapter on the host.

    Attributes:
        folder: The folder it was read from.
        intervention: Name of the method.
        spec: The parsed positions.
        positions: The positions as a string.
        untied: Whether the last positions have weights of their own.
        template: Token ids that end a prompt (alternatives), or None.
        layers: The edited layers, in ascending order.
        all_layers: Whether these are all layers of its model.
        form: See :class:`Form`.
        activation: Name of the method's activation.
        read: A, fp32 ``[sets, L, r, d]``.
        read_bias: c, fp32 ``[sets, L, r]``.
        write: B, fp32 ``[sets, L, r, d]``.
        base_model: Name or path of the model it was trained on, or None.
        fingerprint: The architecture of that model, or None if the folder does not hold it.
        hash: SHA-256 of everything above that changes a result, as hexadecimal digits.
    """

    folder: str
    intervention: str
    spec: Spec
    positions: str
    untied: bool
    template: tuple[tuple[int, ...], ...] | None
    layers: tuple[int, ...]
    all_layers: bool
    form: Form
    activation: str
    read: Tensor
    read_bias: Tensor
    write: Tensor
    base_model: str | None
    fingerprint: Fingerprint | None = None
    hash: str = ""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.write.shape[2]

    @property
    def width(self) -> int:
        """The width d of the hidden states."""
        return self.write.shape[3]

    @property
    def num_sets(self) -> int:
        """Number of weight sets: 2 if the last positions have their own, else 1."""
        return self.write.shape[0]

    @property
    def num_bytes(self) -> int:
        """Size of the weights on the host."""
        return self.read.nbytes + self.read_bias.nbytes + self.write.nbytes

    def describe(self) -> dict[str, Any]:
        """Return what there is to tell about the adapter, in types that JSON has."""
        return {
            "folder": self.folder,
            "hash": self.hash,
            "rank": self.rank,
            "layers": list(self.layers),
            "positions": self.positions,
            "pyreft_positions": self.spec.pyreft,
            "untied": self.untied,
            "activation": self.activation,
            "intervention": self.intervention,
            "bytes": self.num_bytes,
            "base_model": self.base_model,
            "base_fingerprint": None if self.fingerprint is None else self.fingerprint.hash,
        }


def _folded(adapter: SavedAdapter, weights: Weights, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, c and B of one weight set in fp64."""
    write = weights["write"].double()
    bias = fold_subtract_bias(adapter, weights, _TARGET).double()
    read = weights["read"].double() if adapter.kind.reads else torch.zeros_like(write)
    if not adapter.kind.reads:
        bias = activate(bias, adapter.activation)
    if adapter.kind.subtract_projection and not form.subtract_projection:
        read = read - write
    return read, bias, write


def _form(adapter: SavedAdapter) -> Form:
    if adapter.activation == "linear" or not adapter.kind.reads:
        return Form()
    return Form(adapter.activation, adapter.kind.subtract_projection)


def _digest(adapter: ServedAdapter) -> str:
    settings = {
        "spec": list(adapter.spec),
        "untied": adapter.untied,
        "template": adapter.template,
        "layers": adapter.layers,
        "form": list(adapter.form),
        "shape": list(adapter.write.shape),
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in (adapter.read, adapter.read_bias, adapter.write):
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _check_save(folder: Path) -> None:
    """Raise AdapterError if a save of our PEFT tuner to the folder was interrupted."""
    path = folder / peft_folder.WEIGHTS
    if not path.is_file():
        return
    config, (_, metadata) = read_json(folder / peft_folder.CONFIG), read_safetensors(path)
    in_weights, in_config = metadata.get("save_id"), config.get("save_id", "")
    if in_weights is not None and in_config not in (None, in_weights):
        raise AdapterError(
            f"{folder}: a save was interrupted between its weights and {peft_folder.CONFIG}, which "
            "do not belong together; save the adapter again"
        )


def _check_finite(adapter: ServedAdapter) -> None:
    for name, tensor in (("W", adapter.read), ("b", adapter.read_bias), ("R", adapter.write)):
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{adapter.folder}: {name} holds values that are not finite")


def _template(saved: SavedAdapter) -> tuple[tuple[int, ...], ...] | None:
    listed = saved.details.get(peft_folder.NAME, {}).get("response_template")
    if listed is None:
        return None
    try:
        alternatives = tuple(tuple(int(n) for n in ids) for ids in listed)
    except (TypeError, ValueError):
        alternatives = ()
    if not alternatives or not all(alternatives):
        raise AdapterError(
            f"response_template: got {listed!r}, expected lists of token ids, none empty"
        )
    return alternatives


def _fingerprint(path: Path, saved: SavedAdapter) -> Fingerprint | None:
    value = saved.details.get(peft_folder.NAME, {}).get("base_fingerprint")
    try:
        return None if value is None else base_model.from_json(value)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None


def load_adapter(folder: str | Path, positions: str | None = None) -> ServedAdapter:
    """Read an adapter from a folder of PEFT (ours), pyreft or AdapterHub.

    No code from the folder is executed: safetensors, and ``torch.load`` with ``weights_only`` for
    formats that have no other file.

    Args:
        folder: The folder.
        positions: Replaces the folder's positions. Required for a pyreft folder, which has none.

    Raises:
        AdapterError: If the adapter cannot be served: RED and other methods that are no low-rank
            edit, a component other than the output of a block, missing or unknown positions,
            weights that are not finite, or an interrupted save.
        ConversionError: If the files are corrupt or not an adapter. Both are ValueErrors.
    """
    path = Path(folder)
    form = convert.detect(path)
    if form == peft_folder.NAME:
        _check_save(path)
        if read_json(path / peft_folder.CONFIG).get("intervention") == "red":
            raise AdapterError(
                f"{path}: intervention: got 'red', expected a low-rank edit: RED (scale * h + "
                "bias) is not served"
            )
    try:
        saved = convert.load(path, form, Options(positions=positions))
    except ConversionError as error:
        text = str(error)
        raise ConversionError(text if str(path) in text else f"{path}: {text}") from None
    if saved.component != COMPONENT:
        raise AdapterError(
            f"{path}: component: got {saved.component!r}, expected {COMPONENT!r}: only edits of "
            "the output of decoder blocks are served"
        )
    if saved.positions is None:
        raise AdapterError(
            f"{path}: positions: got none, expected a value such as 'f7+l7': a pyreft folder does "
            "not hold them"
        )
    return _served(path, saved)


def _served(path: Path, saved: SavedAdapter) -> ServedAdapter:
    assert saved.positions is not None
    spec = positions_module.parse(saved.positions)
    if spec.modality is not None:
        raise AdapterError(
            f"{path}: positions: got {saved.positions!r}, expected positions without a modality: "
            "the server edits language models"
        )
    layers, form = tuple(sorted(saved.layers)), _form(saved)
    sets = [
        [_folded(saved, saved.layers[layer][i], form) for layer in layers]
        for i in range(1 + saved.untied)
    ]
    read, bias, write = (
        torch.stack([torch.stack([layer[part] for layer in one]) for one in sets]).float()
        for part in range(3)
    )
    adapter = ServedAdapter(
        folder=str(path),
        intervention=saved.intervention,
        spec=spec.as_pyreft() if saved.pyreft_positions else spec,
        positions=saved.positions,
        untied=saved.untied,
        template=_template(saved),
        layers=layers,
        all_layers=saved.all_layers,
        form=form,
        activation=saved.activation,
        read=read,
        read_bias=bias,
        write=write,
        base_model=saved.base_model,
        fingerprint=_fingerprint(path, saved),
    )
    _check_finite(adapter)
    return dataclasses.replace(adapter, hash=_digest(adapter))


class ServedModel(NamedTuple):
    """What adapters of a served model must fit.

    Attributes:
        width: Hidden size.
        num_layers: Number of decoder layers of the whole model.
        fingerprint: The model's architecture; None leaves it unchecked.
    """

    width: int
    num_layers: int
    fingerprint: Fingerprint | None = None


def served_model(
    config: Any, model: str | Path, revision: str | None = None, width: int | None = None
) -> ServedModel:
    """Return what adapters of a model must fit, from its configuration and its files' headers.

    Args:
        config: Its configuration.
        model: Its folder or name.
        revision: Of a name.
        width: The hidden size, where it is known better than from the configuration.

    Raises:
        AdapterError: If a file of the model is damaged.
    """
    text = base_model.text_config(config)
    try:
        fingerprint = base_model.of_checkpoint(config, model, revision)
    except ValueError as error:
        raise AdapterError(f"model: {error}") from None
    return ServedModel(width or text.hidden_size, text.num_hidden_layers, fingerprint)


def check_fits(adapter: ServedAdapter, model: ServedModel, max_rank: int) -> None:
    """Check that an adapter fits a served model.

    Args:
        adapter: The adapter.
        model: The served model.
        max_rank: The largest rank that the bank holds.

    Raises:
        AdapterError: If it does not.
    """
    if adapter.width != model.width:
        raise AdapterError(
            f"{adapter.folder}: width: got an adapter of hidden size {adapter.width}, expected "
            f"{model.width}, the model's"
        )
    if adapter.layers[-1] >= model.num_layers:
        raise AdapterError(
            f"{adapter.folder}: layers: got {list(adapter.layers)}, expected numbers below "
            f"{model.num_layers}, the model's layers"
        )
    if adapter.all_layers and len(adapter.layers) != model.num_layers:
        raise AdapterError(
            f"{adapter.folder}: layers: got 'all' of a model with {len(adapter.layers)} layers, "
            f"expected {model.num_layers}"
        )
    if adapter.fingerprint is not None and model.fingerprint is not None:
        theirs, here = adapter.fingerprint.differences(model.fingerprint)
        if theirs:
            raise AdapterError(
                f"{adapter.folder}: base model: got an adapter of a model with "
                f"{', '.join(theirs)}, expected {', '.join(here)}, the served model's"
            )
    if adapter.rank > max_rank:
        raise AdapterError(
            f"{adapter.folder}: rank: got {adapter.rank}, expected at most max_rank={max_rank}"
        )
