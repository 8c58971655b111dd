"""What identifies the base model of an adapter: its architecture, not the values of its weights.

A :class:`Fingerprint` has the sizes in the model's text configuration and the shapes of the weights
of its blocks. It is the same whatever the dtype, the quantization, the head and the place of the
model. Saving an adapter writes it, and loading and serving compare it with the model at hand.

Releases of transformers name and fuse some weights differently, and quantized files hold packed
ones. Therefore only what both sides know is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from torch import nn

FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "d_model", "n_embd"),
    *("num_hidden_layers", "num_layers", "n_layer"),
    *("num_attention_heads", "num_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "d_ff", "ffn_dim", "n_inner"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # integers are packed weights

Sizes = dict[str, int | str]
Shapes = dict[str, list[list[int]]]


def architecture(config: Any) -> Sizes:
    """Return the values of :data:`FIELDS` that a configuration has.

    Args:
        config: a configuration of transformers, or a dictionary.
    """
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    pairs = [(name, get(name)) for name in FIELDS]
    return {name: value for name, value in pairs if isinstance(value, int | str)}


def text_config(config: Any) -> Any:
    """Return the part of a configuration that has the sizes of the language model."""
    find = getattr(config, "get_text_config", None)
    return find() if callable(find) else config


def size_differences(saved: Sizes, current: Sizes) -> dict[str, tuple[Any, Any]]:
    """Return the fields that both have with different values: saved and current ones."""
    common = [name for name in saved if name in current]
    return {n: (saved[n], current[n]) for n in common if saved[n] != current[n]}


class Fingerprint(NamedTuple):
    """The architecture of a base model.

    Attributes:
        config: values of :data:`FIELDS`.
        shapes: the different shapes of each weight of the blocks, by its name with "#" for numbers:
            "layers.#.mlp.up_proj.weight".
    """

    config: Sizes
    shapes: Shapes

    @property
    def hash(self) -> str:
        """SHA-256 of configuration and shapes, as hexadecimal digits."""
        content = json.dumps([self.config, self.shapes], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as a JSON object; see :func:`from_json`."""
        return {"config": self.config, "shapes": self.shapes, "hash": self.hash}

    def differences(self, current: Fingerprint) -> tuple[list[str], list[str]]:
        """Return what differs, as texts of this fingerprint and of the other one, at most five.

        Weights differ if neither side's shapes contain the other's: a model with a vision tower has
        more blocks than its language model.
        """
        if self.hash == current.hash:
            return [], []
        changed = size_differences(self.config, current.config)
        pairs = {name: changed[name] for name in FIELDS if name in changed}
        here, there = ([f"{name} {pair[i]}" for name, pair in pairs.items()] for i in (0, 1))
        for name in sorted(self.shapes.keys() & current.shapes.keys()):
            ours, theirs = ({tuple(s) for s in side.shapes[name]} for side in (self, current))
            if not ours <= theirs and not theirs <= ours:
                here.append(f"{name} {_listed(ours)}")
                there.append(f"{name} {_listed(theirs)}")
        return here[:5], there[:5]


def _listed(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))


def from_json(value: object) -> Fingerprint:
    """Return the fingerprint that :meth:`Fingerprint.to_json` wrote.

    Raises:
        ValueError: ``value`` is malformed.
    """
    if isinstance(value, Mapping):
        config, shapes = value.get("config"), value.get("shapes")
        if _is_sizes(config) and _is_shapes(shapes):
            return Fingerprint(config, shapes)
    raise ValueError(
        f"base_fingerprint: got {str(value)[:80]!r}, expected an object with the sizes 'config' "
        "and the 'shapes' of weights by name"
    )


def _is_sizes(value: object) -> TypeGuard[Sizes]:
    return isinstance(value, dict) and all(isinstance(v, int | str) for v in value.values())


def _is_shapes(value: object) -> TypeGuard[Shapes]:
    return isinstance(value, dict) and all(
        isinstance(shapes, list)
        and all(isinstance(s, list) and all(isinstance(n, int) for n in s) for s in shapes)
        for shapes in value.values()
    )


def _block_name(name: str) -> str | None:
    """Return the name of a weight of a block with "#" for numbers, or None for other weights."""
    parts = ["#" if part.isdecimal() else part for part in name.split(".")]
    first = parts.index("#") if "#" in parts else 0
    if not first or "experts" in parts:  # experts are fused, and transposed, by some releases
        return None
    return ".".join(parts[first - 1 :])


def _collected(weights: Iterable[tuple[str, Iterable[int]]]) -> Shapes:
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in weights:
        block_name = _block_name(name)
        if block_name is not None:
            found.setdefault(block_name, set()).add(tuple(shape))
    return {name: [list(s) for s in sorted(shapes)] for name, shapes in sorted(found.items())}


def of_model(model: nn.Module, without: Collection[str] = ()) -> Fingerprint:
    """Return the fingerprint of a loaded model.

    Args:
        model: a model, possibly quantized, sharded by DeepSpeed or with adapters of PEFT.
        without: names of modules whose weights are not the base model's.
    """
    return Fingerprint(
        architecture(text_config(getattr(model, "config", None))),
        _collected(_weights(model, without)),
    )


def resized(value: object, model: nn.Module) -> dict[str, Any]:
    """Return a fingerprint as JSON with the sizes that the model's configuration has now."""
    sizes = architecture(text_config(getattr(model, "config", None)))
    return from_json(value)._replace(config=sizes).to_json()


def _weights(model: nn.Module, without: Collection[str]) -> Iterator[tuple[str, Iterable[int]]]:
    """Yield the names and unpacked shapes of a model's weights, without PEFT's."""
    wrapped = ".base_layer"
    wrappers = {n.removesuffix(wrapped) for n, _ in model.named_modules() if n.endswith(wrapped)}
    for path, module in model.named_modules():
        parts = path.split(".")
        if not set(without).isdisjoint(parts):
            continue
        inside = (i for i in range(1, len(parts)) if ".".join(parts[:i]) in wrappers)
        if any(parts[i] != "base_layer" for i in inside):
            continue  # an adapter's weights beside the wrapped layer
        name = path.replace(wrapped, "")
        sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
        linear = all(isinstance(size, int) for size in sizes)
        if linear:  # quantized weights are packed
            yield f"{name}.weight", sizes  # type: ignore[misc]
        for own, parameter in module._parameters.items():
            if parameter is not None and not (linear and own == "weight"):
                yield f"{name}.{own}", getattr(parameter, "ds_shape", parameter.shape)


def of_checkpoint(
    config: Any, model: str | os.PathLike[str], revision: str | None = None
) -> Fingerprint:
    """Return the fingerprint of a saved model, of whose weights only the headers are read.

    Args:
        config: its configuration.
        model: its folder, or its name in the hub, of which the local cache is read. Without
            safetensors files there, the fingerprint has no shapes.
        revision: of a name in the hub.

    Raises:
        ValueError: A header cannot be read.
    """
    folder = Path(model) if Path(model).is_dir() else _cached(str(model), revision)
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    weights = [entry for file in files for entry in _header(file)]
    return Fingerprint(architecture(text_config(config)), _collected(weights))


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name in the hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def _header(path: Path) -> list[tuple[str, list[int]]]:
    """Return the names and shapes of the weights in a safetensors file that are not packed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  (not a dictionary)
            return [(n, list(one.get_shape())) for n, one in slices if one.get_dtype() in _FLOATS]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None
