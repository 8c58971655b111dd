"""Checks that a batch defines its prompts."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.model.deferred_checks import DeferredChecks
from reft_kernels.model.response_rule import (
    Occurrences,
    earlier_turn_is_supervised,
    run_starts,
    supervised_spans,
)
from reft_kernels.model.selection import PositionRule, Selection
from reft_kernels.model.window import Packed, Window

_WAYS = (
    "give the adapter a rule, ReftConfig(response_template=...), which holds in training, scoring "
    "and generation alike; "
    "or pass labels whose prompt is masked by -100, or prompt_lengths=[...] of each example to "
    "the model"
)
_PLAIN_TEXT = "for plain text without prompts, edit every token: ReftConfig(positions='all')"
_TURNS = (
    "expand such a row to one row for each of its responses "
    "(reft_kernels.integrations.turns.expand_turns, as "
    "datasets.Dataset.map(expand_turns, batched=True)); or pass prompt_lengths=[...]"
)
UNKNOWN = (
    "where prompts end is not known: the training batch has neither labels nor prompt_lengths; "
    + _WAYS
)
NO_TEMPLATE = (
    "response_template: an example of this training batch does not contain it, and no labels mask "
    "its prompt; check that the template is in the text and was not truncated, or pass labels "
    "whose prompt is masked by -100"
)
NOTHING = (
    "this training batch selects no token to edit, so the adapter would get no gradient: its "
    "labels mask no prompt "
    "(labels equal to input_ids), or its prompts are empty; " + _WAYS + "; " + _PLAIN_TEXT
)
SEVERAL = (
    "labels: a row has several supervised spans, so it has several prompts, and one edit cannot "
    "serve them; " + _TURNS
)
EARLIER = (
    "labels: a response before the last one is supervised too, but only the last response's "
    "prompt is edited; " + _TURNS
)
_GUESSED = (
    "ReFT: this call does not tell where prompts end, so each whole sequence is taken as prompt; "
    "this is correct for a prompt without a response, but not for a prompt with its response "
    "(perplexity, log-likelihood scoring); " + _WAYS
)
_NO_PROMPT = (
    "ReFT: the labels of this batch mask no prompt, so nothing is edited and the loss is the "
    "frozen model's; " + _WAYS + "; " + _PLAIN_TEXT
)
_CONTINUED = (
    "ReFT: a forward of several tokens continues a cache outside of generate and is taken as "
    "decoding, so it edits nothing; pass prompt_lengths=[...] of the whole prompts if these tokens "
    "belong to them"
)


class Mode(NamedTuple):
    """How a forward runs.

    Attributes:
        training: whether the adapter is trained.
        generates: whether the labels of the model continue a prompt.
    """

    training: bool
    generates: bool


class PromptChecks:
    """Checks the batches of one model; each warning is given once."""

    def __init__(self) -> None:
        self.deferred = DeferredChecks()
        self._warned: set[str] = set()

    def warn_once(self, message: str) -> None:
        """Give a warning, unless it was given before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def check(
        self, window: Window, rule: PositionRule, selection: Selection | None, mode: Mode
    ) -> None:
        """Check that an adapter's rule finds the prompts of a batch.

        Raises in training; in evaluation most problems only give a warning.

        Args:
            window: the part of the batch that the forward processes.
            rule: the positions that the adapter edits.
            selection: the rows that the rule selects, or None.
            mode: how the forward runs.

        Raises:
            ValueError: in training, prompt ends are unknown or no token is selected; or the labels
                contain several responses.
        """
        if window.call.is_explicit:
            return
        if rule.spec.kind != "all" and mode.generates:
            self._check_rule(window, rule, mode)
        if mode.training and selection is not None and selection.rows is not None:
            self.deferred.refuse((selection.rows < 0).all(), NOTHING)

    def _check_rule(self, window: Window, rule: PositionRule, mode: Mode) -> None:
        if window.packed is not None:
            self._check_packed(window, window.packed, rule, mode)
        elif window.lengths is None:
            if window.generation is None and window.width > 1 and not torch.compiler.is_compiling():
                self.warn_once(_CONTINUED)
        elif window.source in ("labels", "sequence"):
            occurrences = None if rule.template is None else window.occurrences(rule.template)
            if window.labels is not None and window.source == "labels":
                self._check_labels(window.labels, window.lengths, occurrences, mode)
            elif occurrences is None:
                self._unknown(mode)
            else:
                self._missing((occurrences.last == 0).any(), mode)

    def _unknown(self, mode: Mode) -> None:
        if mode.training:
            raise ValueError(UNKNOWN)
        if not torch.compiler.is_compiling():
            self.warn_once(_GUESSED)

    def _missing(self, flag: Tensor, mode: Mode) -> None:
        """Handle examples without the template; ``flag`` is true if there are any."""
        if mode.training:
            self.deferred.refuse(flag, NO_TEMPLATE)
        elif _known_true(flag):
            self.warn_once(_GUESSED)

    def _check_labels(
        self, labels: Tensor, lengths: Tensor, occurrences: Occurrences | None, mode: Mode
    ) -> None:
        several = supervised_spans(labels) > 1
        if occurrences is None:
            self.deferred.refuse(several.any(), SEVERAL)
            if not mode.training and _known_true((lengths == 0).all()):
                self.warn_once(_NO_PROMPT)
            return
        absent = occurrences.last == 0
        self.deferred.refuse((several & absent).any(), SEVERAL)
        self.deferred.refuse(earlier_turn_is_supervised(occurrences, labels).any(), EARLIER)
        self._missing((absent & (lengths == 0)).any(), mode)

    def _check_packed(self, window: Window, packed: Packed, rule: PositionRule, mode: Mode) -> None:
        sequence, place, begins = packed
        ends = None if rule.template is None else window.packed_ends(rule.template)[sequence]
        absent = torch.ones_like(sequence, dtype=torch.bool) if ends is None else ends == 0
        if window.labels is None:
            if rule.template is None:
                self._unknown(mode)
            else:
                self._missing(absent.any(), mode)
            return
        starts = (
            run_starts(window.labels, begins.view(window.labels.shape)).reshape(-1).to(torch.int64)
        )
        spans = torch.zeros_like(place).index_add_(0, sequence, starts)[sequence]
        self.deferred.refuse(((spans > 1) & absent).any(), SEVERAL)
        occurrences = None if rule.template is None else window.occurrences(rule.template)
        if occurrences is not None and ends is not None:
            after = occurrences.after[:, :-1].reshape(-1)  # an occurrence ends before this token
            earlier = after & (place < ends) & (place > 0) & (window.labels.reshape(-1) != -100)
            self.deferred.refuse(earlier.any(), EARLIER)


def _known_true(flag: Tensor) -> bool:
    """Whether a bool scalar is true; False if reading it would synchronize or break a graph."""
    return flag.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flag)
