"""Positions -> rows: which rows of ``hidden.view(-1, d)`` an edit touches, built once a batch and
shared by all layers.

A rows tensor is int32 ``[N]`` on the hidden state's device; -1 skips an entry, so that N depends on
shapes alone and building it needs no synchronisation. Spec strings, for a prompt of ``length``
tokens (pyreft's semantics, which are the paper's):

    "f7+l7"   first and last n of the prompt; each n is clamped to length // 2, so that no row is
              chosen twice
    "f3"      first n of the prompt, clamped to length
    "l1"      last n of the prompt, clamped to length
    "prompt"  every prompt token
    "all"     every token that is not padding, prompt or not
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


class Spec(NamedTuple):
    """A parsed position spec: ``kind`` is "ends" (first and last), "prompt" or "all".

    ``pyreft`` counts "ends" as pyreft's ReftDataset classes do: without the prompt's last token,
    and at most half of the rest.
    """

    kind: str
    first: int = 0
    last: int = 0
    pyreft: bool = False

    def as_pyreft(self) -> Spec:
        """The same, counted as pyreft's ReftDataset classes do.

        Raises:
            ValueError: the spec has no first or last tokens to count.
        """
        if self.kind != "ends":
            raise ValueError(
                f"pyreft_positions: got True with positions {self.kind!r}, expected 'fN', 'lN' or "
                "'fN+lM'"
            )
        return self._replace(pyreft=True)

    @property
    def halves(self) -> bool:
        """Whether each end gets at most half of the prompt, so that no token is chosen twice."""
        return self.pyreft or (self.first > 0 and self.last > 0)

    @property
    def per_example(self) -> int | None:
        """Entries of ``rows`` for each example; None where it is the sequence length."""
        return self.first + self.last if self.kind == "ends" else None


def parse(spec: str) -> Spec:
    """Parse a position spec.

    Raises:
        TypeError: not a string. ValueError: not of the form "f7+l7", "f3", "l1", "prompt" or "all".
    """
    if not isinstance(spec, str):
        raise TypeError(f"positions: got {describe(spec)}, expected a string such as 'f7+l7'")
    text = spec.replace(" ", "").lower()
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
    """Column of each example's first real token, int64 ``[B]``, from a mask ``[B, T]`` (0 where
    there is none).
    """
    return attention_mask.to(torch.int8).argmax(dim=1)


def prompt_lengths_from_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Prompt lengths ``[B]`` of a training batch: the prompt ends at the first label that is not
    -100.

    Args:
        labels: int64 ``[B, T]``, aligned with the input ids. attention_mask: ``[B, T]`` or None (no
            padding).

    Returns:
        int64 ``[B]``; an example without any label is prompt as a whole.
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
    """Rows of a batch whose values are known to be right; tensor operations only, so neither
    synchronisation nor copy.

    Args:
        spec: a parsed spec. starts, lengths: int64 ``[B]``, column of the first prompt token and
            prompt length.
        width: T, columns of the hidden state at hand. token_mask: bool ``[B, T]`` of real tokens,
            for ``all``.
        stride: rows from one example to the next; T when None, 0 where starts are rows of one
            packed sequence.
        offset: column at which the hidden state at hand starts (chunked prefill); prompt tokens
            outside it become -1.

    Returns:
        int32 ``[B * P]``, example by example: first entries, then last entries.
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
        chosen = torch.cat([steps[0] < counts[0], steps[1] < counts[1]], dim=1)
        columns = columns - offset
        chosen = chosen & (columns >= 0) & (columns < width)
    else:
        columns = torch.arange(width, device=device).expand(batch, width)
        if spec.kind == "prompt":
            absolute = columns + offset
            chosen = (absolute >= starts.unsqueeze(1)) & (
                absolute < (starts + lengths).unsqueeze(1)
            )
        else:
            chosen = (
                torch.ones_like(columns, dtype=torch.bool) if token_mask is None else token_mask
            )
    rows = torch.where(chosen, base + columns, -1).to(torch.int32).flatten()
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
    """Rows of a padded batch ``[B, seq_len, d]`` for a position spec.

    Args:
        spec: "f7+l7", "f3", "l1", "prompt" or "all"; see the module's text.
        prompt_lengths: number of prompt tokens of each example, ``[B]``.
        seq_len: T, columns of the batch, padding included.
        padding_side: "right" or "left". Padded left without a mask, a prompt ends at the last
            column.
        attention_mask: ``[B, T]``, nonzero for real tokens; it tells where each example starts.
        pyreft_positions: count as pyreft's ReftDataset classes do: without each prompt's last token
        ("l1" is the one before), and never more than half of the rest. Its helpers and the paper's
        script count the last token.
        device: of the result; by default that of the mask or the lengths.

    Returns:
        int32 ``[B * P]``, P = n + m for "fn+lm", else seq_len; -1 where a prompt is too short or a
        token is not chosen.

    Raises:
        TypeError, ValueError: a spec that does not parse, lengths beyond the sequence, a mask of
            another shape.
    """
    parsed = parse(spec).as_pyreft() if pyreft_positions else parse(spec)
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
    device=None,
) -> Tensor:
    """Rows of a packed batch ``[M, d]`` whose sequence i is rows ``cu_seqlens[i]`` to
    ``cu_seqlens[i + 1]``.

    Args:
        spec: "f7+l7", "f3" or "l1" ("prompt" and "all" choose by token: use :func:`from_mask`).
        cu_seqlens: ``[B + 1]``, starting at 0, not decreasing. prompt_lengths: ``[B]``; None: all
        is prompt.

    Returns:
        int32 ``[B * P]``.

    Raises:
        TypeError, ValueError: as :func:`resolve`, or offsets that do not start at 0 or decrease.
    """
    parsed = parse(spec)
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
    """Rows from explicit columns ``[B, P]`` of a batch ``[B, seq_len, d]``; -1 pads.

    Raises:
        ValueError: a column out of range or chosen twice for one example, or another shape or
            dtype.
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
    """Rows from a boolean mask ``[B, T]`` (or ``[M]``): int32, one entry a token, -1 where the
    mask is false.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (1, 2):
        raise ValueError(f"mask: got {describe(mask)}, expected a bool tensor [B, T] or [M]")
    flat = mask.flatten()
    rows = torch.where(flat, torch.arange(flat.shape[0], device=mask.device), -1).to(torch.int32)
    return mark_rows(rows, flat.shape[0])


def weight_ids(spec: str | Spec, batch: int, *, device: torch.device | str | None = None) -> Tensor:
    """Weight sets of untied "fn+lm" positions: 0 for first entries, 1 for last, int32 ``[B * P]``
    in :func:`resolve`'s order.

    Raises:
        ValueError: the spec does not choose both first and last tokens.
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
