"""The description of a model family, and batches for its models.

The descriptions (paths of blocks and roles, real tokens) are written by hand and do not use the
library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Any]
Padding = Literal["right", "left", "none"]
Place = tuple[str, str]  # (module path, "input" or "output")

VOCAB, WIDTH, BATCH = 99, 32, 3
LENGTHS = (12, 7, 3)
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5

# configuration values of recent decoders, BERT-like encoders, GPT-2 and BART
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    **SPECIAL,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 64,
    "initializer_range": 0.15,
    **SPECIAL,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
    "init_std": 0.15,
    "forced_eos_token_id": None,
    **SPECIAL,
}


class MissingClass(Exception):
    """The installed transformers has no such class."""


def transformers_class(name: str) -> Any:
    """A class of transformers by name.

    Raises:
        MissingClass: this version of transformers does not have it.
    """
    cls = getattr(transformers, name, None)
    if cls is None:
        raise MissingClass(f"transformers {transformers.__version__} has no {name}")
    return cls


def rope(**more: Any) -> dict[str, Any]:
    """Settings of rotary embeddings, in the format of the installed transformers."""
    if VERSION_5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default", **more}}


def maker(model: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A function that creates ``model`` from ``config(**settings)``; omits settings of ``...``."""
    arguments = {k: v for k, v in settings.items() if v is not ...}
    return lambda: transformers_class(model)(transformers_class(config)(**arguments))


@dataclasses.dataclass(frozen=True)
class Role:
    """A component and the expected places.

    Args:
        component: a role or a module path.
        at: templates of module paths with ``{}`` for the layer, one for each naming scheme in
            the supported versions of transformers; the first whose modules exist is used.
        side: "input" or "output".
        layers: the layers; None: all.
        tokens: whether the rows are the tokens of the text.
    """

    component: str
    at: tuple[str, ...]
    side: str = "output"
    layers: tuple[int, ...] | None = None
    tokens: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny model of one family, its inputs and its blocks.

    Args:
        name: name of the family.
        kind: group of families in the table.
        make: creates the model.
        inputs: (padding, batch size) -> a batch; None if the family has no such padding.
        blocks: templates of the blocks' paths, as in :class:`Role`.
        count: number of blocks.
        tokens: batch -> bool ``[B, T]``, the real rows of the hidden states; None: all rows.
        component: the component to edit.
        layout: axes of the hidden states: batch, time, streams, width.
        generates: whether the model has ``generate``.
        labels: "prompt" if labels continue a prompt, "decoder" if they are a decoder's labels (one
            column before its input), "" if the calls have no labels.
        scores_tokens: whether logits are ``[B, T, V]`` and undefined at padding tokens.
        refused: part of the library's error message; "" if the family is supported.
        pads: whether the model pads its hidden states on the right.
        note: remark for the table.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[str, int], Batch | None]
    blocks: tuple[str, ...]
    count: int
    tokens: Callable[[Batch], Tensor | None] | None = None
    component: str = "block_output"
    layout: Literal["btd", "tbd", "btsd", "sbtd"] = "btd"
    generates: bool = False
    labels: Literal["", "prompt", "decoder"] = ""
    scores_tokens: bool = False
    refused: str = ""
    pads: bool = False
    note: str = ""

    def role(self) -> Role:
        """The family's component on all layers."""
        return Role(self.component, self.blocks, tokens=self.tokens is not None)


def places(model: nn.Module, role: Role, count: int) -> list[Place]:
    """The places of a role, from the first template whose modules exist."""
    layers = range(count) if role.layers is None else role.layers
    names = {name for name, _ in model.named_modules()}
    for template in role.at:
        paths = [template.format(n) for n in layers] if "{}" in template else [template]
        if all(path in names for path in paths):
            return [(path, role.side) for path in paths]
    raise AssertionError(f"{type(model).__name__} has none of {role.at}: the catalogue is wrong")


FAMILIES: dict[str, Family] = {}


def add(family: Family) -> Family:
    """Add a family to the catalogue."""
    assert family.name not in FAMILIES, family.name
    FAMILIES[family.name] = family
    return family


_FIELDS = {field.name for field in dataclasses.fields(Family)} | {"at", "config", "base"}


def split(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keywords into arguments of :class:`Family` and settings of the configuration."""
    family = {k: v for k, v in keywords.items() if k in _FIELDS}
    return family, {k: v for k, v in keywords.items() if k not in _FIELDS}


def paths(at: str | tuple[str, ...]) -> tuple[str, ...]:
    """Templates of block paths, from the paths of their lists."""
    return tuple(f"{path}.{{}}" for path in ([at] if isinstance(at, str) else at))


# ---- batches


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padding_mask(lengths: list[int], padding: str, width: int) -> Tensor:
    """Attention mask, int64 ``[B, width]``, 1 at real tokens."""
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, (slice(width - length, width) if padding == "left" else slice(length))] = 1
    return mask


def text(padding: str, batch: int, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """A batch of token ids, with a mask if it is padded."""
    width = max(lengths)
    mask = padding_mask(
        [width] * batch if padding == "none" else list(lengths[:batch]), padding, width
    )
    ids = torch.randint(5, VOCAB, (batch, width), generator=generator(11)) * mask
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}


def text_tokens(batch: Batch) -> Tensor:
    """Mask of the real tokens of the text, bool ``[B, T]``."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


def decoder_tokens(batch: Batch) -> Tensor:
    """Mask of the decoder's tokens, bool ``[B, T]``; all are real."""
    return torch.ones_like(batch["decoder_input_ids"]).bool()


def with_decoder_ids(batch: Batch | None, start: int = 2) -> Batch | None:
    """A batch with six decoder tokens added."""
    if batch is None:
        return None
    size = next(iter(batch.values())).shape[0]
    ids = torch.randint(5, VOCAB, (size, 6), generator=generator(12))
    ids[:, 0] = start
    return {**batch, "decoder_input_ids": ids}


def without(batch: Batch, *names: str) -> Batch:
    return {k: v for k, v in batch.items() if k not in names}


def mark_prompt(family: Family, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
    """Mark about two thirds of each example as prompt.

    Returns:
        Labels int64 ``[B, T]``, prompt tokens bool ``[B, T]``, prompt lengths.
    """
    if family.labels == "decoder":
        ids = batch["decoder_input_ids"]
        lengths = [2 + row % 3 for row in range(ids.shape[0])]
        labels = torch.full_like(ids, -100)
        prompt = torch.zeros_like(ids, dtype=torch.bool)
        for row, length in enumerate(lengths):  # label j is the decoder's input at column j + 1
            labels[row, length - 1 : -1] = ids[row, length:]
            labels[row, -1] = 2
            prompt[row, :length] = True
        return labels, prompt, lengths
    ids, real = batch["input_ids"], text_tokens(batch)
    labels = torch.where(real, ids, -100)
    prompt, lengths = torch.zeros_like(real), []
    for row in range(ids.shape[0]):
        columns = [c for c in range(ids.shape[1]) if real[row, c]]
        lengths.append(max(1, 2 * len(columns) // 3))
        labels[row, columns[: lengths[-1]]] = -100
        prompt[row, columns[: lengths[-1]]] = True
    return labels, prompt, lengths
