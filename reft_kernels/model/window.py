"""The part of a batch that one forward sees, and where each example's prompt is in it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.model.explicit_arguments import explicit_lengths
from reft_kernels.model.generation import Generation
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.response_rule import Occurrences, Template, find_template, supervised


class Packed(NamedTuple):
    """A packed batch, flattened to ``[B * T]``: each token's sequence, its place there, whether
    it starts one.
    """

    sequence: Tensor
    place: Tensor
    begins: Tensor


@dataclasses.dataclass
class Window:
    """The part of a batch that one forward of a backbone sees: columns ``offset`` to ``offset +
    width``.

    ``starts`` and ``lengths`` int64 ``[B]`` are the prompts, in columns of the whole; None while
    decoding. ``source`` says what
    ended them: "prompt_lengths", "generate", "labels" or "sequence". ``tokens`` is the mask ``[B,
    width]`` of real tokens here, None where all are; ``text`` the token ids ``[B, total]`` of the
    whole, where they are known.
    """

    batch: int
    width: int
    device: torch.device
    offset: int | Tensor = 0
    total: int | Tensor = 0  # columns of the whole, where the prompts are
    continues: bool = False  # a cache is filled: more of the prompt may be to come
    starts: Tensor | None = None
    lengths: Tensor | None = None
    source: str = "sequence"
    tokens: Tensor | None = None
    whole: Tensor | None = None
    text: Tensor | None = None
    packed: Packed | None = None
    labels: Tensor | None = None
    call: ModelCall = ModelCall()
    generation: Generation | None = None
    found: dict[Template, Occurrences] = dataclasses.field(default_factory=dict)

    def occurrences(self, template: Template) -> Occurrences | None:
        """Where ``template`` ends in the whole text; None where the text is not known."""
        if self.generation is not None and self.text is None:
            return self.generation.occurrences(template, self.batch, self.device)
        if self.text is None:
            return None
        if template not in self.found:
            text = self.text if self.whole is None else torch.where(self.whole, self.text, -1)
            segments = (
                None if self.packed is None else self.packed.sequence.view(self.batch, self.width)
            )
            self.found[template] = find_template(text, template, segments)
        return self.found[template]

    def prompt_lengths(self, template: Template | None) -> Tensor | None:
        """Prompt lengths int64 ``[B]`` under an adapter's rule; None while decoding."""
        if template is None or self.lengths is None or self.source == "prompt_lengths":
            return self.lengths
        found = self.occurrences(template)
        if found is None:
            return self.lengths
        return torch.where(found.last > 0, (found.last - self.starts).clamp(min=0), self.lengths)

    def packed_prompt(self, template: Template | None) -> Tensor:
        """Bool ``[B * T]``: the prompts' tokens of a packed batch under an adapter's rule."""
        sequence, place, _ = self.packed
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
        """Int64 ``[B * T]``: for each sequence of a packed batch the tokens up to its last
        template's end, 0 without one.
        """
        found, (sequence, place, _) = self.occurrences(template), self.packed
        ends = torch.where(found.after[:, 1:].reshape(-1), place + 1, 0)
        return torch.zeros_like(place).scatter_reduce(0, sequence, ends, "amax")

    def _packed_lengths(self) -> Tensor:
        given = self.call.prompt_lengths
        given = (given if isinstance(given, Tensor) else torch.as_tensor(given)).to(
            device=self.device
        )
        if (
            given.dim() != 1
            or given.is_floating_point()
            or given.dtype == torch.bool
            or not given.numel()
        ):
            raise ValueError(
                f"prompt_lengths: got {given.dtype} {tuple(given.shape)}, expected one integer "
                "for each sequence"
            )
        sequence, place, _ = self.packed
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(sequence[-1]) + 1 if sequence.numel() else 0
            sizes = torch.zeros(count, dtype=torch.int64).scatter_reduce(
                0, sequence, place + 1, "amax"
            )
            if given.shape[0] != count:
                raise ValueError(
                    f"prompt_lengths: got {given.shape[0]} for a packed batch, expected {count}, "
                    "its sequences"
                )
            explicit_lengths(given, count, sizes, self.device)
        return given.to(torch.int64)[: place.shape[0]]
