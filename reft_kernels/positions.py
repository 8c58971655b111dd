"""Conversion of token positions to row numbers.

A rows tensor lists the rows of ``hidden.view(-1, d)`` that an edit changes. It is built once per
batch and shared by all layers. It is int32 ``[N]`` on the device of the hidden states; -1 skips an
entry. N therefore depends only on shapes, and building the tensor needs no synchronization.

A position spec is a string. For a prompt of ``length`` tokens, as in pyreft and the paper:

    "f7+l7"   The first 7 and the last 7 prompt tokens. Both counts are limited to length // 2, so
              that no token is selected twice.
    "f3"      The first 3 prompt tokens, or all if the prompt is shorter.
    "l1"      The last prompt token; "lN" selects the last N, or all if the prompt is shorter.
    "prompt"  All prompt tokens.
    "all"     All tokens except padding.

In a model of several modalities, a prefix names the tokens among which a spec counts; those between
them are passed over:

    "text:f7+l7"   The first 7 and the last 7 tokens of the prompt that are no placeholders of an
                   image, video or audio input. Their number replaces ``length``.
    "image:f3"     The first 3 placeholders of images; "video" and "audio" likewise.
    "image"        All of them: "image:prompt".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.checks import check_row_values, describe, mark_rows
from reft_kernels.deprecation import warn_renamed

_TERM = re.compile(r"^([fl])([1-9][0-9]*)$")
IGNORED_LABEL = -100
MODALITIES = ("text", "image", "video", "audio")


class Spec(NamedTuple):
    """A parsed position spec.

    Attributes:
        kind: "ends" (first and last tokens), "prompt" or "all".
        first: Number of first tokens, for kind "ends".
        last: Number of last tokens, for kind "ends".
        pyreft: Whether "ends" is counted as in pyreft's ReftDataset classes: excluding the last
            prompt token, and each count limited to half of the remaining tokens.
        modality: The tokens that are counted, of :data:`MODALITIES`; None for all.
    """

    kind: str
    first: int = 0
    last: int = 0
    pyreft: bool = False
    modality: str | None = None

    def as_pyreft(self) -> Spec:
        """Return this spec with ``pyreft`` set.

        Raises:
            ValueError: If the kind is not "ends", or the spec counts tokens of one modality.
        """
        if self.modality is not None:
            raise ValueError(
                f"pyreft_positions: got True with positions '{self.modality}:...', expected False: "
                "pyreft counts all tokens"
            )
        if self.kind != "ends":
            raise ValueError(
                f"pyreft_positions: got True with positions {self.kind!r}, expected 'fN', 'lN' or "
                "'fN+lM'"
            )
        return self._replace(pyreft=True)

    @property
    def halves(self) -> bool:
        """Whether both counts are limited to half of the prompt."""
        return self.pyreft or (self.first > 0 and self.last > 0)

    @property
    def per_example(self) -> int | None:
        """Number of ``rows`` entries per example, or None if it equals the sequence length."""
        return self.first + self.last if self.kind == "ends" else None


def parse(spec: str) -> Spec:
    """Parse a position spec; spaces and case are ignored.

    Raises:
        TypeError: If ``spec`` is not a string.
        ValueError: If it is not of the form "f7+l7", "f3", "l1", "prompt" or "all", with or without
            a modality before it.
    """
    if not isinstance(spec, str):
        raise TypeError(f"positions: got {describe(spec)}, expected a string such as 'f7+l7'")
    text = spec.replace(" ", "").lower()
    modality, colon, rest = text.partition(":")
    if colon or text in MODALITIES:
        if modality not in MODALITIES or ":" in rest or rest in MODALITIES:
            raise ValueError(
                f"positions: got {spec!r}, expected one of {', '.join(MODALITIES)} before a colon"
            )
        return parse(rest if colon else "prompt")._replace(modality=modality)
    if text in ("all", "prompt"):
        return Spec(text)
    counts: dict[str, int] = {}
    for term in text.split("+"):
        match = _TERM.match(term)
        if match is None or match[1] in counts:
            raise ValueError(
                f"positions: got {spec!r}, expected 'fN', 'lN', 'fN+lM' with N, M >= 1, 'prompt' "
                "or 'all'"
            )
        counts[match[1]] = int(match[2])
    return Spec("ends", counts.get("f", 0), counts.get("l", 0))


def _of_all_tokens(spec: str) -> Spec:
    """Return a parsed spec that needs no token ids."""
    parsed = parse(spec)
    if parsed.modality is not None:
        raise ValueError(
            f"positions: got {spec!r}, expected a spec without a modality: {parsed.modality} "
            "tokens are told from others by their ids; use from_mask or from_indices"
        )
    return parsed


def _lengths_tensor(prompt_lengths: Tensor | Sequence[int], name: str = "prompt_lengths") -> Tensor:
    lengths = (
        prompt_lengths if isinstance(prompt_lengths, Tensor) else torch.as_tensor(prompt_lengths)
    )
    if lengths.numel() == 0:
        lengths = lengths.to(torch.int64)
    if (
        lengths.dim() != 1
        or lengths.dtype.is_floating_point
        or lengths.dtype in (torch.bool, torch.complex64)
    ):
        raise ValueError(
            f"{name}: got {describe(lengths)}, expected one integer for each example, [B]"
        )
    return lengths


def _check_seq_len(seq_len: int) -> None:
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 0:
        raise ValueError(f"seq_len: got {seq_len!r}, expected an integer >= 0")


def _check_mask(mask: Tensor, batch: int, seq_len: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != (batch, seq_len):
        raise ValueError(
            f"attention_mask: got {describe(mask)}, expected a tensor of shape ({batch}, {seq_len})"
        )
    return mask.bool()


def _check_lengths(lengths: Tensor, limits: Tensor | int, what: str) -> None:
    wrong = (lengths < 0) | (lengths > limits)
    if lengths.numel() and bool(wrong.any()):
        example = int(wrong.to(torch.int8).argmax())
        limit = limits if isinstance(limits, int) else int(limits[example])
        raise ValueError(
            f"prompt_lengths: got {int(lengths[example])} for example {example}, expected 0 to "
            f"{limit}, {what}"
        )


def first_tokens(attention_mask: Tensor) -> Tensor:
    """Return the column of each example's first real token.

    Args:
        attention_mask: ``[B, T]``, nonzero for real tokens.

    Returns:
        int64 ``[B]``; 0 for an example without real tokens.
    """
    return attention_mask.to(torch.int8).argmax(dim=1)


def prompt_lengths_from_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the prompt lengths of a training batch.

    The prompt ends before the first label other than -100.

    Args:
        labels: int64 ``[B, T]``, aligned with the input ids.
        attention_mask: ``[B, T]``, nonzero for real tokens, or None if there is no padding.

    Returns:
        int64 ``[B]``. In an example without labels all real tokens belong to the prompt.
    """
    supervised = labels != IGNORED_LABEL
    mask = torch.ones_like(supervised) if attention_mask is None else attention_mask.bool()
    before = supervised.to(torch.int8).cumsum(dim=1) == 0
    return (before & mask).sum(dim=1)


def prompt_rows(
    spec: Spec,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    *,
    token_mask: Tensor | None = None,
    offset: Tensor | int = 0,
    stride: int | None = None,
) -> Tensor:
    """Return the rows of a batch, without checking the arguments and without synchronization.

    Args:
        spec: A parsed spec.
        starts: int64 ``[B]``, the column of each example's first prompt token.
        lengths: int64 ``[B]``, the prompt lengths.
        width: T, the number of columns of the hidden states.
        token_mask: bool ``[B, T]``, true for real tokens; used by "all". None if all are real.
        offset: The column of the sequence at which the hidden states start (chunked prefill). For
            prompt tokens outside the hidden states the entry is -1.
        stride: Number of rows from one example to the next; ``width`` if None. 0 for a packed
            sequence, where ``starts`` are row numbers.

    Returns:
        int32 ``[B * P]``, example by example: first the entries of the first tokens, then those of
        the last tokens.
    """
    batch, device = starts.shape[0], starts.device
    base = torch.arange(batch, device=device).unsqueeze(1) * (width if stride is None else stride)
    if spec.kind == "ends":
        lengths = (lengths - 1).clamp(min=0) if spec.pyreft else lengths
        available = (lengths // 2 if spec.halves else lengths).unsqueeze(1)
        steps = torch.arange(spec.first, device=device), torch.arange(spec.last, device=device)
        counts = [available.clamp(max=n) for n in (spec.first, spec.last)]
        ends = (starts + lengths).unsqueeze(1)
        columns = torch.cat([starts.unsqueeze(1) + steps[0], ends - counts[1] + steps[1]], dim=1)
        selected = torch.cat([steps[0] < counts[0], steps[1] < counts[1]], dim=1)
        columns = columns - offset
        selected = selected & (columns >= 0) & (columns < width)
    else:
        columns = torch.arange(width, device=device).expand(batch, width)
        if spec.kind == "prompt":
            absolute = columns + offset
            selected = (absolute >= starts.unsqueeze(1)) & (
                absolute < (starts + lengths).unsqueeze(1)
            )
        else:
            selected = (
                torch.ones_like(columns, dtype=torch.bool) if token_mask is None else token_mask
            )
    rows = torch.where(selected, base + columns, -1).to(torch.int32).flatten()
    return mark_rows(rows, batch * width)


def resolve(
    spec: str,
    prompt_lengths: Tensor | Sequence[int],
    seq_len: int,
    *,
    padding_side: str = "right",
    attention_mask: Tensor | None = None,
    pyreft_positions: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the rows of a padded batch ``[B, seq_len, d]`` for a position spec.

    Args:
        spec: "f7+l7", "f3", "l1", "prompt" or "all"; see the module documentation.
        prompt_lengths: ``[B]``, the number of prompt tokens of each example.
        seq_len: T, the number of columns, including padding.
        padding_side: "right" or "left". With "left" and no mask, each prompt ends at the last
            column.
        attention_mask: ``[B, T]``, nonzero for real tokens, or None. It determines the column at
            which each example starts.
        pyreft_positions: Count as pyreft's ReftDataset classes do: excluding each prompt's last
            token ("l1" is the token before it), with each count limited to half of the remaining
            tokens. pyreft's helper functions and the paper's script include the last token.
        device: Device of the result; defaults to that of the mask or the lengths.

    Returns:
        int32 ``[B * P]``, with P = n + m for "fn+lm" and P = seq_len for "prompt" and "all". The
        entry is -1 where a prompt is too short or a token is not selected.

    Raises:
        TypeError: If ``spec`` is not a string.
        ValueError: If ``spec`` does not parse, a prompt is longer than the sequence, or another
            argument is invalid.
    """
    parsed = _of_all_tokens(spec)
    parsed = parsed.as_pyreft() if pyreft_positions else parsed
    _check_seq_len(seq_len)
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side: got {padding_side!r}, expected 'right' or 'left'")
    lengths = _lengths_tensor(prompt_lengths)
    batch = lengths.shape[0]
    mask = None
    if attention_mask is not None:
        mask = _check_mask(attention_mask, batch, seq_len)
        _check_lengths(
            lengths.to(mask.device), mask.sum(1), "the example's tokens by attention_mask"
        )
    else:
        _check_lengths(lengths, seq_len, "seq_len")
    if device is None:
        device = lengths.device if mask is None else mask.device
    lengths = lengths.to(device=device, dtype=torch.int64)
    mask = None if mask is None else mask.to(device)
    if mask is not None:
        starts = first_tokens(mask) if seq_len else torch.zeros_like(lengths)
    else:
        starts = seq_len - lengths if padding_side == "left" else torch.zeros_like(lengths)
    return prompt_rows(parsed, starts, lengths, seq_len, token_mask=mask)


def resolve_packed(
    spec: str,
    cu_seqlens: Tensor | Sequence[int],
    prompt_lengths: Tensor | Sequence[int] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the rows of a packed batch ``[M, d]`` for a position spec.

    Args:
        spec: "f7+l7", "f3" or "l1". For "prompt" and "all" use :func:`from_mask`.
        cu_seqlens: ``[B + 1]``, non-decreasing, starting at 0. Sequence i consists of the rows
            ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]`` (exclusive).
        prompt_lengths: ``[B]``, or None if the prompts are the whole sequences.
        device: Device of the result; defaults to that of ``cu_seqlens``.

    Returns:
        int32 ``[B * P]``, with P = n + m for "fn+lm".

    Raises:
        TypeError: If ``spec`` is not a string.
        ValueError: If ``spec``, ``cu_seqlens`` or ``prompt_lengths`` is invalid.
    """
    parsed = _of_all_tokens(spec)
    if parsed.kind != "ends":
        raise ValueError(
            f"positions: got {spec!r} for a packed batch, expected 'fN', 'lN' or 'fN+lM'; see "
            "from_mask for the others"
        )
    cu = _lengths_tensor(cu_seqlens, "cu_seqlens")
    if cu.shape[0] < 1 or int(cu[0]) != 0 or bool((cu[1:] < cu[:-1]).any()):
        raise ValueError(
            f"cu_seqlens: got {cu.tolist()[:8]}, expected offsets that start at 0 and do not "
            "decrease"
        )
    sizes = cu[1:] - cu[:-1]
    lengths = sizes if prompt_lengths is None else _lengths_tensor(prompt_lengths).to(sizes.device)
    if lengths.shape != sizes.shape:
        raise ValueError(
            f"prompt_lengths: got {lengths.shape[0]} examples, expected {sizes.shape[0]}, as "
            "cu_seqlens says"
        )
    _check_lengths(lengths, sizes, "the sequence's tokens by cu_seqlens")
    target = cu.device if device is None else torch.device(device)
    total, starts, lengths = (
        int(cu[-1]),
        cu[:-1].to(target, torch.int64),
        lengths.to(target, torch.int64),
    )
    return mark_rows(prompt_rows(parsed, starts, lengths, total, stride=0), total)


def from_indices(
    index: Tensor, seq_len: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the rows of explicit columns of a batch ``[B, seq_len, d]``.

    Args:
        index: int32 or int64 ``[B, P]``, columns of each example; -1 skips an entry.
        seq_len: The number of columns of the batch.
        device: Device of the result; defaults to that of ``index``.

    Returns:
        int32 ``[B * P]``.

    Raises:
        ValueError: If a column is out of range or occurs twice in an example, or if ``index`` has
            the wrong shape or dtype.
    """
    _check_seq_len(seq_len)
    if (
        not isinstance(index, Tensor)
        or index.dim() != 2
        or index.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"index: got {describe(index)}, expected an integer tensor [B, P]")
    if index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= seq_len:
            raise ValueError(
                f"index: got columns from {low} to {high}, expected [0, {seq_len}), or -1 to skip "
                "an entry"
            )
    base = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * seq_len
    rows = torch.where(index < 0, -1, index + base).to(torch.int32).flatten()
    check_row_values(rows, index.shape[0] * seq_len, "index")
    moved = rows if device is None else rows.to(device)
    return mark_rows(moved, index.shape[0] * seq_len)


def from_mask(mask: Tensor) -> Tensor:
    """Return the rows selected by a boolean mask.

    Args:
        mask: bool ``[B, T]`` or ``[M]``.

    Returns:
        int32 ``[B * T]`` or ``[M]``: the row number where the mask is true, else -1.

    Raises:
        ValueError: If ``mask`` has the wrong shape or dtype.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
        raise ValueError(f"mask: got {describe(mask)}, expected a bool tensor [B, T] or [M]")
    flat = mask.flatten()
    rows = torch.where(flat, torch.arange(flat.shape[0], device=mask.device), -1).to(torch.int32)
    return mark_rows(rows, flat.shape[0])


def weight_ids(spec: str | Spec, batch: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return weight set numbers that give first and last tokens separate (untied) weights.

    Args:
        spec: A spec "fn+lm", or a parsed one.
        batch: B, the number of examples.
        device: Device of the result.

    Returns:
        int32 ``[B * P]`` in the order of :func:`resolve`: 0 for first tokens, 1 for last tokens.

    Raises:
        ValueError: If the spec does not select both first and last tokens.
    """
    parsed = parse(spec) if isinstance(spec, str) else spec
    if not (parsed.first and parsed.last):
        raise ValueError(
            f"positions: got {spec!r}, expected 'fN+lM': untied weights need first and last tokens"
        )
    pattern = torch.arange(parsed.first + parsed.last, device=device) >= parsed.first
    return mark_rows(pattern.to(torch.int32).repeat(batch), 2)


def set_ids(spec: str | Spec, batch: int, *, device: torch.device | str | None = None) -> Tensor:
    """Deprecated name of :func:`weight_ids`."""
    warn_renamed("positions.set_ids", "positions.weight_ids")
    return weight_ids(spec, batch, device=device)
