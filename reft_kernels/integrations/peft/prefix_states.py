"""Training forwards that keep the states which training does not change.

Let c be the first token of a row that is edited or whose next token has a label. In a causal
model, the states of the tokens before c are those of the frozen model, so their keys and values
stay the same during training. So do the hidden states of all tokens below the first edited layer.
Both are kept across epochs, up to a number of bytes. A training forward then runs the tokens from c
on, through the layers above the first edit:

    a row of n tokens         prefix 0 ... c - 1          c ... n - 1
    layers below the edits    not run                     kept hidden states
    the other layers          kept keys and values        run, with a graph

Rows are found by their token ids, hence in any order. Rows that are not kept are computed first, by
a forward of the frozen model without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reft_kernels.integrations.peft.prefix_rows import TrainingRows, read_rows
from reft_kernels.integrations.peft.prefix_store import (
    KeptRow,
    PrefixStatistics,
    PrefixStore,
    padded_hidden,
    prefix_cache,
)
from reft_kernels.integrations.peft.prefix_support import only_editor, only_session, refuse_unfit
from reft_kernels.integrations.peft.skipped_blocks import SkippedBlocks
from reft_kernels.model.backbone_session import Adapter
from reft_kernels.model.families import transformers_version
from reft_kernels.model.interception import InterceptedForward
from reft_kernels.model.members import BASE, Members
from reft_kernels.model.model_call import argument_names, take_call
from reft_kernels.model.per_thread import PerThread
from reft_kernels.model.prompt_checks import Mode
from reft_kernels.model.prompts import compute_prompt_window
from reft_kernels.model.selection import select
from reft_kernels.model.supervised_logits import find_causal_lm
from reft_kernels.positions import IGNORED_LABEL

logger = logging.getLogger(__name__)
_LIMITS = {torch.float32: 2e-3, torch.float64: 1e-6}  # TF32 products have errors of 5e-4
_HALF_LIMIT = 3e-2
_CHECKPOINTING = (
    "model: gradient checkpointing drops key-value caches, and layer 0 is edited, so no states can "
    "be kept; turn gradient checkpointing off"
)
_CHECKPOINTING_BEFORE_5 = (
    "model: gradient checkpointing of transformers 4 recomputes layers whose states are kept; turn "
    "gradient checkpointing off, or use transformers 5"
)


class _Call(NamedTuple):
    """The rows of a call and what can be kept of them.

    Attributes:
        rows: the batch.
        lengths: int64 ``[B]``, number of tokens of each prompt.
        prefix: int64 ``[B]``, number of tokens of each prefix.
        skipped: number of first layers that are skipped.
    """

    rows: TrainingRows
    lengths: Tensor
    prefix: Tensor
    skipped: int

    @property
    def sizes(self) -> Tensor:
        """Number of tokens after each prefix, int64 ``[B]``."""
        return self.rows.counts - self.prefix


class PrefixStates:
    """Keeps states of the frozen model across training steps, until :meth:`close`.

    See :func:`~reft_kernels.integrations.peft.keep_prefix_states`.

    Attributes:
        statistics: what was found and computed; printing it gives one line.
    """

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        self.closed = False
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes: got {max_bytes!r}, expected a positive integer")
        self.editor = editor = only_editor(model)
        self.model: Any = find_causal_lm(model)
        self.session = only_session(editor, self.model)
        backbone = self.session.backbone
        refuse_unfit(self.model, backbone)
        forward: Any = self.model.__dict__.get("forward")
        while isinstance(forward, InterceptedForward):
            if isinstance(forward.observer, PrefixStates) and not forward.observer.closed:
                raise ValueError("model: it already keeps prefix states; call close() first")
            forward = forward.replaced
        self.names = argument_names(self.model)
        self._store = PrefixStore(max_bytes)
        self._blocks = SkippedBlocks(self.model, backbone)
        self._kept_below: int | None = None  # layers skipped by the rows of the store
        self._verified = False
        self._used: PerThread[list[bool]] = PerThread(list)
        self._require_something_to_keep()
        self._blocks.install()
        self._forward = InterceptedForward(self.model, self, first=True)

    @property
    def statistics(self) -> PrefixStatistics:
        """What was found and computed since this object was made."""
        return self._store.statistics

    def clear(self) -> None:
        """Drop what is kept. Required after a change of the frozen model's weights."""
        self._store.clear()

    def close(self) -> None:
        """Run training forwards as before, drop what is kept, and log the statistics."""
        if self.closed:
            return
        self.closed = True
        self._forward.remove()
        self._blocks.remove()
        self._store.close()
        logger.info("%s", self.statistics)

    def __enter__(self) -> PrefixStates:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict:
        raise TypeError(
            "a model that keeps prefix states cannot be copied or pickled; call close() first"
        )

    # ---- what can be kept

    def _skipped(self, adapters: Sequence[Adapter]) -> int:
        """Number of first layers whose outputs no edit changes."""
        sites = [site for adapter in adapters for p in adapter.places.values() for _, site in p]
        return self._blocks.unedited([self.session.targets[site] for site in sites])

    def _refuse_checkpointing_before_5(self) -> None:
        if self._blocks.checkpointed and transformers_version() < 5:
            raise ValueError(_CHECKPOINTING_BEFORE_5)

    def _require_something_to_keep(self) -> None:
        adapters = self.editor.active_in(self.session)
        for adapter in adapters:
            if adapter.rule.counted is not None:
                raise ValueError(
                    f"positions: adapter {adapter.name!r} counts {adapter.rule.counted.modality} "
                    "tokens, expected positions without a modality: kept states are those before "
                    "the first edited token of all"
                )
        self._refuse_checkpointing_before_5()
        if not adapters or self._skipped(adapters):
            return
        if self._blocks.checkpointed:
            raise ValueError(_CHECKPOINTING)
        for adapter in adapters:
            spec = adapter.rule.spec
            if spec.kind != "ends" or spec.first:
                raise ValueError(
                    f"positions: adapter {adapter.name!r} edits the first tokens of a prompt in "
                    "layer 0, so no state stays the same; expected last tokens only, such as 'l7', "
                    "or layers that start above 0"
                )

    def _read(self, arguments: dict[str, Any]) -> _Call | None:
        """Read a call; None if it runs as it is."""
        editor, session = self.editor, self.session
        if self.closed or torch.compiler.is_compiling():
            return None
        if not (self.model.training and torch.is_grad_enabled()):
            return None
        adapters = editor.active_in(session)
        if not adapters:
            return None
        explicit = arguments.get("edit_positions") is not None
        if explicit or editor.state.members is not None or editor.state.generation is not None:
            return None
        rows = read_rows(arguments)
        if rows is None:
            return None
        call = take_call(self.names, (), dict(arguments))
        tokens = {
            name: arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids")
        }
        window = compute_prompt_window(
            tokens, call, None, token_labels=editor.token_labels, decoder=False
        )
        if window is None or window.packed is not None:
            return None
        edited, lengths = [], []
        for adapter in adapters:
            selection = select(window, adapter.rule)
            mode = Mode(adapter.trains(), editor.token_labels)
            editor.checks.check(window, adapter.rule, selection, mode)
            found = window.prompt_lengths(adapter.rule.template)
            if selection is None or found is None:
                return None
            edited.append(selection.rows)
            lengths.append(found)
        if any(not torch.equal(lengths[0], other) for other in lengths[1:]):
            return None  # adapters with different response templates
        prefix, skipped = rows.first_needed(edited), self._skipped(adapters)
        self._refuse_checkpointing_before_5()
        if self._blocks.checkpointed:
            if not skipped:
                raise ValueError(_CHECKPOINTING)
            prefix = torch.zeros_like(prefix)
        elif skipped == len(self._blocks.blocks):
            prefix = torch.zeros_like(prefix)  # no layer runs, so none needs keys and values
        if not skipped and not bool(prefix.any()):
            return None
        return _Call(rows, lengths[0], prefix, skipped)

    # ---- around the model

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace the batch by the tokens that have to run."""
        used = self._used.here
        used.append(False)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call = self._read(arguments)
        if call is None:
            training = not self.closed and self.model.training and torch.is_grad_enabled()
            self.statistics.plain_calls += training
            return args, kwargs
        kept = self._kept(call)
        inputs, hidden = self._shortened(call, kept), padded_hidden(kept)
        rows, sizes = call.rows, call.sizes
        if not self._verified:
            self._verify(call, inputs, hidden)
        self.statistics.calls += 1
        self.statistics.tokens += int(rows.counts.sum())
        self.statistics.tokens_run += int(sizes.sum())
        self._blocks.enter(call.skipped, hidden)
        used[-1] = True
        read = {"labels": rows.tokens(rows.labels, call.prefix, sizes, IGNORED_LABEL)}
        return (), {**arguments, **inputs, **read, "prompt_lengths": call.lengths}

    def leave(self, output: Any) -> Any:
        """Remove the logits, which are those of some tokens only."""
        used = self._used.here
        if not used or not used.pop():
            return None
        self._blocks.leave()
        if output is None:
            return None
        return type(output)(**{name: v for name, v in output.items() if name != "logits"})

    # ---- kept states

    @staticmethod
    def _shortened(call: _Call, kept: Sequence[KeptRow]) -> dict[str, Any]:
        """Arguments of the backbone: the tokens after each prefix, and a cache of the prefixes."""
        rows, prefix, sizes = call.rows, call.prefix, call.sizes
        lengths = prefix.tolist()
        width = max(lengths)
        ids = rows.tokens(rows.ids, prefix, sizes, 0)
        columns = torch.arange(width + ids.shape[1], device=ids.device)
        mask = (columns >= (width - prefix).unsqueeze(1)) & (columns < (width + sizes).unsqueeze(1))
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "position_ids": rows.tokens(rows.positions, prefix, sizes, 0),
            "past_key_values": prefix_cache(kept, lengths, call.skipped) if width else None,
            "use_cache": False,
        }

    def _frozen(self, inputs: Mapping[str, Any]) -> Tensor:
        """The last hidden state of the frozen model, without a graph."""
        state = self.editor.state
        # one name stands for all examples
        members, state.members = state.members, Members((BASE,), (), torch.device("cpu"))
        try:
            with torch.no_grad():
                return self.session.backbone(**inputs)[0]
        finally:
            state.members = members

    def _kept(self, call: _Call) -> list[KeptRow]:
        """The states of each row, kept or computed."""
        if self._kept_below != call.skipped:
            self._store.clear()
            self._kept_below = call.skipped
        prefix = call.prefix.tolist()
        keys = self._keys(call, prefix)
        rows = self._store.find(keys)
        missing = {key: n for n, (key, row) in enumerate(zip(keys, rows, strict=True)) if not row}
        # a prefix of no tokens has no states
        empty = KeptRow(None, None, None)
        computed = dict.fromkeys(missing, empty)
        if not call.skipped:
            missing = {key: n for key, n in missing.items() if prefix[n]}
        if missing:
            computed |= self._compute(call, missing)
        for key, row in computed.items():
            self._store.add(key, row)
        return [row or computed[key] for key, row in zip(keys, rows, strict=True)]

    def _keys(self, call: _Call, prefix: Sequence[int]) -> list[bytes]:
        """Token and position ids that the states of each row depend on, and its prefix."""
        rows = call.rows
        both = torch.stack([rows.ids, rows.positions], -1).to("cpu", torch.int32)
        ends = rows.counts.tolist() if call.skipped else prefix
        starts = rows.starts.tolist()
        return [
            b"%d:" % c + both[n, start : start + end].numpy().tobytes()
            for n, (start, end, c) in enumerate(zip(starts, ends, prefix, strict=True))
        ]

    def _compute(self, call: _Call, missing: Mapping[bytes, int]) -> dict[bytes, KeptRow]:
        """Run the frozen model on the rows with these numbers."""
        index = torch.tensor(list(missing.values()), device=call.prefix.device)
        rows, prefix = call.rows.subset(index), call.prefix[index]
        sizes = rows.counts if call.skipped else prefix
        begin = torch.zeros_like(sizes)
        ids = rows.tokens(rows.ids, begin, sizes, 0)
        columns = torch.arange(ids.shape[1], device=ids.device)
        cache = DynamicCache() if bool(prefix.any()) else None
        with self._blocks.recording(call.skipped, cache is not None) as recorded:
            self._frozen(
                {
                    "input_ids": ids,
                    "attention_mask": (columns < sizes.unsqueeze(1)).long(),
                    "position_ids": rows.tokens(rows.positions, begin, sizes, 0),
                    "past_key_values": cache,
                    "use_cache": cache is not None,
                }
            )
        keys, values = self._keys_and_values(cache, call.skipped)
        computed = {}
        for number, (key, c, n) in enumerate(
            zip(missing, prefix.tolist(), sizes.tolist(), strict=True)
        ):
            computed[key] = KeptRow(
                keys[:, number, :, :c].clone() if c and keys is not None else None,
                values[:, number, :, :c].clone() if c and values is not None else None,
                recorded.hidden[number, c:n].clone() if recorded.hidden is not None else None,
            )
        return computed

    def _keys_and_values(
        self, cache: DynamicCache | None, skipped: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Keys and values of the layers that run, ``[layers, B, heads, T, head_dim]``."""
        if cache is None:
            return None, None
        layers = cache.layers[skipped:]
        shapes = {tuple(t.shape) for layer in layers for t in (layer.keys,)}
        if len(cache.layers) != len(self._blocks.blocks) or len(shapes) != 1:
            raise ValueError(
                f"model: {type(self.model).__name__} does not cache keys and values of one shape "
                "in each layer; prefix states need that"
            )
        return torch.stack([x.keys for x in layers]), torch.stack([x.values for x in layers])

    def _verify(self, call: _Call, inputs: Mapping[str, Any], hidden: Tensor | None) -> None:
        """Compare the frozen model with kept states and without, once, on the first batch.

        Raises:
            ValueError: they differ by more than rounding.
        """
        rows = call.rows
        mask = {"attention_mask": rows.real.long(), "position_ids": rows.positions}
        whole = self._frozen({"input_ids": rows.ids, "use_cache": False} | mask)
        self._blocks.enter(call.skipped, hidden)
        try:
            found = self._frozen(inputs)
        finally:
            self._blocks.leave()
        columns = torch.arange(rows.ids.shape[1], device=whole.device)
        after = columns >= (rows.starts + call.prefix).unsqueeze(1)
        want = whole[rows.real & after].float()
        got = found[columns[: found.shape[1]] < call.sizes.unsqueeze(1)].float()
        error = float((got - want).norm() / want.norm())
        computed = next(self.session.backbone.parameters()).dtype
        if torch.is_autocast_enabled(whole.device.type):
            computed = torch.get_autocast_dtype(whole.device.type)
        if not error <= _LIMITS.get(computed, _HALF_LIMIT):
            raise ValueError(
                f"model: the states of {type(self.model).__name__} depend on more than the tokens "
                f"before them and their position ids (relative difference {error:.1e}), so they "
                "cannot be kept; for padding on the left, try position_ids"
            )
        self._verified = True


def keep_prefix_states(model: nn.Module, *, max_bytes: int) -> PrefixStates:
    """Keep what training does not change of each row, until the returned object is closed.

    ::

        with keep_prefix_states(model, max_bytes=2 * 2**30) as states:
            trainer.train()
        print(states.statistics)

    Two kinds of states are kept on the model's device: the keys and values of the tokens before the
    first edited one, where positions are the last tokens of a prompt ("l7"), and the hidden states
    below the first edited layer, for any positions. Training forwards run on the remaining tokens
    and layers only. Losses and gradients are those of the model up to rounding.

    It serves training calls with ``input_ids`` and ``labels`` ``[B, T]``, padded on one side, whose
    loss is computed by the model; their output has ``logits=None``. All other calls run as they
    are: evaluation, packed rows, ``edit_positions``, ``inputs_embeds``, ``output_hidden_states``.
    Rows are found by their token ids and position ids. With padding on the left, models without
    explicit ``position_ids`` count padding, so that a row is found again only with as much padding.

    Under gradient checkpointing no keys and values are kept, because its layers drop caches.
    On an accelerator each training forward waits a few times for sizes of the batch. The first one
    compares the frozen model with kept states and without.

    Args:
        model: a causal language model of transformers with ReFT adapters of PEFT, or a wrapper of
            it. Nothing but the adapters may be trained in its backbone, and it must have no
            dropout. It must not be sharded by FSDP or DeepSpeed, whose processes all have to run
            the same layers. Call :meth:`PrefixStates.clear` after other weights were loaded.
        max_bytes: limit of the size of the kept states. When it is reached, other rows are computed
            in each step.

    Returns:
        A :class:`PrefixStates`.

    Raises:
        ValueError: nothing can be kept with these positions and layers, or not in this model; or
            the model keeps prefix states already.
    """
    return PrefixStates(model, max_bytes)
