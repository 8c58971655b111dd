"""BREP: RED on the prompt and the first generated tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.checks import describe, mark_rows
from reft_kernels.interventions import RED
from reft_kernels.positions import Spec, first_tokens, prompt_rows


def prefix_rows(
    prompt_lengths: Tensor,
    seq_len: int,
    tokens: int,
    *,
    edit_prompt: bool = True,
    attention_mask: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Return the rows of each example's prompt and first generated tokens.

    Does not synchronize.

    Args:
        prompt_lengths: int32 or int64 ``[B]``, the number of prompt tokens of each example.
        seq_len: T, the number of columns of the hidden states ``[B, T, d]``.
        tokens: Number of generated tokens to edit.
        edit_prompt: Whether prompt tokens are edited too.
        attention_mask: ``[B, offset + seq_len]``, nonzero for real tokens, or None if there is no
            padding. It determines where the prompts start.
        offset: Column of the sequence at which the hidden states start. In a decode step this is
            the number of tokens in the cache.

    Returns:
        int32 ``[B * seq_len]``: the row number, or -1 where nothing is edited.

    Raises:
        TypeError: If ``prompt_lengths`` is not an integer tensor.
        ValueError: If an argument has the wrong shape, device or value.
    """
    for name, value in (("seq_len", seq_len), ("tokens", tokens), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: got {value!r}, expected an integer >= 0")
    if not isinstance(prompt_lengths, Tensor) or prompt_lengths.dtype not in (
        torch.int32,
        torch.int64,
    ):
        raise TypeError(
            f"prompt_lengths: got {describe(prompt_lengths)}, expected an integer tensor [B]"
        )
    if prompt_lengths.dim() != 1:
        raise ValueError(f"prompt_lengths: got shape {tuple(prompt_lengths.shape)}, expected [B]")
    batch, lengths = prompt_lengths.shape[0], prompt_lengths.long()
    starts = torch.zeros_like(lengths)
    if attention_mask is not None:
        shape = (batch, offset + seq_len)
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask: got {describe(attention_mask)}, expected a tensor of shape "
                f"{shape}"
            )
        if attention_mask.device != lengths.device:
            raise ValueError(
                f"attention_mask: got device {attention_mask.device}, expected {lengths.device}, "
                "where prompt_lengths is"
            )
        starts = first_tokens(attention_mask.bool()) if offset + seq_len else starts
    # The edited tokens are contiguous, so they can be treated like a prompt
    first, count = (
        (starts, lengths + tokens)
        if edit_prompt
        else (starts + lengths, torch.full_like(lengths, tokens))
    )
    rows = prompt_rows(Spec("prompt"), first, count, seq_len, offset=offset)
    if attention_mask is not None:
        rows = torch.where(attention_mask[:, offset:].bool().flatten(), rows, -1)
    return mark_rows(rows, batch * seq_len)


class BREP(RED):
    """BREP: scale * h + bias on the prompt and the first n generated tokens.

    Apply this module at the rows that :meth:`rows` returns. The authors edit the output of the last
    projection of the feed-forward network. Like their code, the default edits all prompt tokens and
    the first n generated tokens; ``edit_prompt=False`` edits only generated tokens. The authors
    also keep |bias| near a target with a PID controller in the loss. The controlled value is
    :meth:`bias_norm`; the controller itself is not part of this module.

    Args:
        embed_dim: d.
        tokens: n, the number of generated tokens to edit.
        edit_prompt: Whether prompt tokens are edited too.
        **kwargs: Arguments of :class:`reft_kernels.RED`.

    Raises:
        ValueError: If an argument is out of range.

    Source: Liang et al., "Bias-Restrained Prefix Representation Finetuning for Mathematical
    Reasoning", 2025, arXiv:2511.10707. RED: Wu et al., "Advancing Parameter Efficiency in
    Fine-tuning via Representation Editing", 2024.
    """

    def __init__(
        self, embed_dim: int, tokens: int, *, edit_prompt: bool = True, **kwargs: Any
    ) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"tokens: got {tokens!r}, expected an integer >= 0")
        super().__init__(embed_dim, **kwargs)
        self.tokens, self.edit_prompt = tokens, bool(edit_prompt)

    def rows(
        self,
        prompt_lengths: Tensor,
        seq_len: int,
        *,
        attention_mask: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Return the rows to edit; see :func:`prefix_rows`.

        Call this once per batch or decode step; the result is the same for all layers.
        """
        return prefix_rows(
            prompt_lengths,
            seq_len,
            self.tokens,
            edit_prompt=self.edit_prompt,
            attention_mask=attention_mask,
            offset=offset,
        )

    def bias_norm(self) -> Tensor:
        """Return |bias|, a differentiable scalar (``[S]`` with ``num_sets``) in fp32 or fp64."""
        return torch.linalg.vector_norm(
            self.bias, dim=-1, dtype=torch.promote_types(self.bias.dtype, torch.float32)
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, tokens={self.tokens}, edit_prompt={self.edit_prompt}"
