"""The part of a batch that one forward processes, and the prompts in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.model.explicit_arguments import explicit_lengths, repeat_examples
from reft_kernels.model.generation import Generation
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.response_rule import Occurrences, Template, find_template, supervised


class Packed(NamedTuple):
    """A packed batch, flattened to ``[B * T]``.

    Attributes:
        sequence: int64 ``[B * T]``, number of each token's sequence.
        place: int64 ``[B * T]``, index of each token in its sequence.
        begins: bool ``[B * T]``, whether a token starts a sequence.
    """

    sequence: Tensor
    place: Tensor
    begins: Tensor


@dataclasses.dataclass
class Window:
    """The columns ``offset`` to ``offset + width`` of a batch, and its prompts.

    Attributes:
        batch: batch size B.
        width: number of columns of this forward.
        device: device of the tokens.
        offset: first column of this forward; an integer tensor if the cache counts on its device.
        total: number of columns of the whole sequence so far.
        continues: whether a cache is filled, so that later forwards may contain more of the prompt.
        starts: int64 ``[B]``, first column of each prompt in the whole; None while decoding.
        lengths: int64 ``[B]``, number of tokens of each prompt; None while decoding.
        source: where the lengths are from: "prompt_lengths", "generate", "labels" or "sequence".
        tokens: bool ``[B, width]``, real tokens of this forward; None: all.
        whole: bool ``[B, n]``, real tokens of the whole; None: all.
        text: integer token ids ``[B, total]`` of the whole; None if unknown.
        ids: integer token ids ``[B, width]`` of this forward; None if unknown.
        packed: the sequences of a packed batch.
        labels: int64 ``[B, width]``, if they continue a prompt.
        call: arguments of the model's call.
        generation: the running ``generate``.
        cached_occurrences: occurrences of response templates, by template.
    """

    batch: int
    width: int
    device: torch.device
    offset: int | Tensor = 0
    total: int | Tensor = 0
    continues: bool = False
    starts: Tensor | None = None
    lengths: Tensor | None = None
    source: str = "sequence"
    tokens: Tensor | None = None
    whole: Tensor | None = None
    text: Tensor | None = None
    ids: Tensor | None = None
    packed: Packed | None = None
    labels: Tensor | None = None
    call: ModelCall = ModelCall()
    generation: Generation | None = None
    cached_occurrences: dict[Template, Occurrences] = dataclasses.field(default_factory=dict)

    def of_examples(self, examples: Sequence[int]) -> Window:
        """The window of some examples of a batch that is not packed and not being generated."""
        if len(examples) == self.batch:
            return self
        index = torch.tensor(examples, device=self.device)
        part = dataclasses.replace(self, batch=len(examples), cached_occurrences={})
        for name in ("starts", "lengths", "tokens", "whole", "text", "ids", "labels"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[index])
        return part

    def occurrences(self, template: Template) -> Occurrences | None:
        """Occurrences of ``template`` in the whole text; None if the text is unknown."""
        if self.generation is not None and self.text is None:
            return self.generation.occurrences(template, self.batch, self.device)
        if self.text is None:
            return None
        if template not in self.cached_occurrences:
            text = self.text if self.whole is None else torch.where(self.whole, self.text, -1)
            segments = (
                None if self.packed is None else self.packed.sequence.view(self.batch, self.width)
            )
            self.cached_occurrences[template] = find_template(text, template, segments)
        return self.cached_occurrences[template]

    def prompt_ids(self) -> Tensor | None:
        """Integer token ids ``[B, n]`` of the whole prompts; None if they are not known."""
        if self.text is not None or self.generation is None:
            return self.text
        text = self.generation.text
        if text is not None and text.shape[1] == self.generation.width:
            return repeat_examples(text.to(self.device), self.batch, "input_ids")
        whole = isinstance(self.offset, int) and self.offset == 0 and self.width == self.total
        return self.ids if whole else None

    def prompt_lengths(self, template: Template | None) -> Tensor | None:
        """Prompt lengths for an adapter's response template, int64 ``[B]``; None while decoding."""
        if template is None or self.lengths is None or self.source == "prompt_lengths":
            return self.lengths
        occurrences = self.occurrences(template)
        if occurrences is None or self.starts is None:
            return self.lengths
        last = occurrences.last
        return torch.where(last > 0, (last - self.starts).clamp(min=0), self.lengths)

    def packed_prompt(self, template: Template | None) -> Tensor:
        """Mask of the prompt tokens of a packed batch, bool ``[B * T]``."""
        sequence, place, _ = self._packed()
        if self.call.prompt_lengths is not None:
            return place < self._packed_lengths()[sequence]
        prompt = torch.ones_like(place, dtype=torch.bool)
        if self.labels is not None:
            chosen = supervised(self.labels).reshape(-1).to(torch.int64)
            running = chosen.cumsum(0)
            first = torch.arange(place.shape[0], device=self.device) - place
            prompt = running == (running - chosen)[first]
        if template is None:
            return prompt
        length = self.packed_ends(template)[sequence]
        return torch.where(length > 0, place < length, prompt)

    def packed_ends(self, template: Template) -> Tensor:
        """Number of tokens up to the end of the last template in each packed sequence.

        Returns:
            int64 ``[B * T]``, indexed by the number of the sequence; 0 without an occurrence.
        """
        sequence, place, _ = self._packed()
        occurrences = self.occurrences(template)
        if occurrences is None:
            return torch.zeros_like(place)
        ends = torch.where(occurrences.after[:, 1:].reshape(-1), place + 1, 0)
        return torch.zeros_like(place).scatter_reduce(0, sequence, ends, "amax")

    def _packed(self) -> Packed:
        assert self.packed is not None, "only for packed batches"
        return self.packed

    def _packed_lengths(self) -> Tensor:
        """The argument ``prompt_lengths`` of a packed batch, checked; int64 ``[sequences]``."""
        lengths = self.call.prompt_lengths
        lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths)
        lengths = lengths.to(device=self.device)
        if (
            lengths.dim() != 1
            or lengths.is_floating_point()
            or lengths.dtype == torch.bool
            or not lengths.numel()
        ):
            raise ValueError(
                f"prompt_lengths: got {lengths.dtype} {tuple(lengths.shape)}, expected one integer "
                "for each sequence"
            )
        sequence, place, _ = self._packed()
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(sequence[-1]) + 1 if sequence.numel() else 0
            sizes = torch.zeros(count, dtype=torch.int64).scatter_reduce(
                0, sequence, place + 1, "amax"
            )
            if lengths.shape[0] != count:
                raise ValueError(
                    f"prompt_lengths: got {lengths.shape[0]} for a packed batch, expected {count}, "
                    "its sequences"
                )
            explicit_lengths(lengths, count, sizes, self.device)
        return lengths.to(torch.int64)[: place.shape[0]]
