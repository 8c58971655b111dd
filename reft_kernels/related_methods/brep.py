"""BREP: RED on the tokens with which an answer starts."""

from __future__ import annotations

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
    """Rows of each example's first generated tokens, and of its prompt, in a hidden state ``[B,
    seq_len, d]``.

    Args:
        prompt_lengths: integers ``[B]``, prompt tokens of each example. seq_len: columns of the
            hidden state at hand.
        tokens: n, generated tokens to edit. edit_prompt: whether prompt tokens are edited too.
        attention_mask: ``[B, offset + seq_len]``, nonzero for real tokens: it tells where prompts
        start. None: no padding.
        offset: column at which the hidden state at hand starts; in a decode step, the tokens
            already in the cache.

    Returns:
        int32 ``[B * seq_len]``, -1 where nothing is edited; tensor operations only, so no
        synchronisation.

    Raises:
        TypeError, ValueError: an argument of another kind or shape, naming it.
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
    # what is edited is one run of tokens: as if it were a prompt of its own
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
    """BREP: scale * h + bias, elementwise over d, on the prompt and the first n generated tokens;
    later tokens are untouched.

    Variant: the authors' code edits every prompt token and the first n decode steps, and so does
    the default; ``edit_prompt=False`` edits generated tokens alone. The edit is
    :class:`reft_kernels.RED` at the rows of :meth:`rows`; the authors put it on the output of the
    feed-forward's last projection. They hold |bias| near a target by a PID controller in
    the loss: :meth:`bias_norm` is what it controls, the controller is the trainer's.

    Args:
        embed_dim: d. tokens: n, generated tokens to edit. edit_prompt: see above. kwargs: as
            :class:`reft_kernels.RED`.

    Raises:
        ValueError: an argument out of range.

    Source: Liang et al., "Bias-Restrained Prefix Representation Finetuning for Mathematical
    Reasoning", 2025, arXiv:2511.10707;
    RED: Wu et al., "Advancing Parameter Efficiency in Fine-tuning via Representation Editing",
    2024.
    """

    def __init__(self, embed_dim: int, tokens: int, *, edit_prompt: bool = True, **kwargs) -> None:
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
        """:func:`prefix_rows` with this module's n; int32 ``[B * seq_len]``, once a batch or
        decode step for all layers.
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
        """|bias|, a differentiable scalar (``[S]`` with ``num_sets``), fp32 at least."""
        return torch.linalg.vector_norm(
            self.bias, dim=-1, dtype=torch.promote_types(self.bias.dtype, torch.float32)
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, tokens={self.tokens}, edit_prompt={self.edit_prompt}"
