"""Groups the adapters of a batch, so that one launch a layer serves each group.

Adapters form a group at the sites that they edit together if their edits have one formula (see
:func:`~reft_kernels.interventions.banks.formula_of`). The weights of a group are a
:class:`~reft_kernels.interventions.banks.Bank`. Forwards without gradients keep the banks until the
weights of an adapter change; forwards with gradients build them of the adapters in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reft_kernels.interventions import Intervention
from reft_kernels.interventions.banks import Bank, LayerWeights, formula_of
from reft_kernels.model.forward_context import Edit
from reft_kernels.model.members import Members, join_selections
from reft_kernels.model.prompt_checks import Mode, PromptChecks
from reft_kernels.model.scaled_selection import rank_of, scaled_selection
from reft_kernels.model.selection import PositionRule, Selection, TokenShape, select
from reft_kernels.model.window import Window

WeightsOf = Callable[[Intervention], LayerWeights]


class Member:
    """An adapter in a group.

    Attributes:
        name: name of the adapter.
        rule: the positions that it edits.
        stack: its stacked intervention of the group's width.
        indices: its layers' indices in the stack, one for each site of the group.
    """

    def __init__(self, name: str, rule: PositionRule, stack: Intervention) -> None:
        self.name = name
        self.rule = rule
        self.stack = stack
        self.indices: list[int] = []


class MemberGroup:
    """Adapters of one formula that edit the same sites.

    Attributes:
        members: the adapters.
        sites: the sites that all of them edit.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.sites: list[int] = []
        self._bank: tuple[Bank, LayerWeights] | None = None

    def bank(self, weights_of: WeightsOf) -> tuple[Bank, LayerWeights]:
        """The group's bank and its weights at each site; built on the first call."""
        if self._bank is None:
            members = self.members
            bank = Bank([m.stack for m in members], [m.indices for m in members])
            # not inference tensors, because a later backward pass may save the weights
            inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
                self._bank = bank, bank.build(weights_of)
        return self._bank


def group_members(
    adapters: Mapping[str, Any], names: Sequence[str], weights_of: WeightsOf
) -> list[MemberGroup]:
    """The groups of the adapters ``names``.

    Args:
        adapters: the adapters of a session, by name.
        names: names of adapters; those that the session does not have are skipped.
        weights_of: returns the weights of all layers of a stack.
    """
    by_site: dict[int, dict[tuple, list[tuple[str, int, int]]]] = {}
    for name, adapter in [(name, adapters[name]) for name in names if name in adapters]:
        for width, stack in adapter.stacks.items():
            formula = formula_of(stack, weights_of(stack)[0])
            for index, site in adapter.places[width]:
                formulas = by_site.setdefault(site, {})
                formulas.setdefault(formula, []).append((name, width, index))
    groups: dict[tuple, MemberGroup] = {}
    for site, formulas in by_site.items():
        for formula, entries in formulas.items():
            key = (formula, *((name, width) for name, width, _ in entries))
            if key not in groups:
                groups[key] = MemberGroup(
                    [
                        Member(name, adapters[name].rule, adapters[name].stacks[width])
                        for name, width, _ in entries
                    ]
                )
            groups[key].sites.append(site)
            for member, (_, _, index) in zip(groups[key].members, entries, strict=True):
                member.indices.append(index)
    return list(groups.values())


class KeptGroups:
    """The groups of a session's adapters for forwards without gradients, kept between them."""

    def __init__(self) -> None:
        # (table, adapters, weights by stack, groups); replaced as a whole, for other threads
        self._kept: tuple[tuple, tuple, dict[Intervention, LayerWeights], list[MemberGroup]]
        self._kept = ((), (), {}, [])

    def groups(
        self, adapters: Mapping[str, Any], members: Members
    ) -> tuple[list[MemberGroup], WeightsOf]:
        """The groups of ``members.table``, and the weights that they were made of.

        Made anew if the table grew, an adapter was replaced, or the weights of an adapter of the
        batch changed.
        """
        table, held, weights, groups = self._kept
        here = tuple(adapters.get(name) for name in members.table)
        if (
            table == members.table
            and all(a is b for a, b in zip(held, here, strict=True))
            and all(
                weights.get(stack) is stack()  # the same list as long as the parameters are
                for name in members.present
                if name in adapters
                for stack in adapters[name].stacks.values()
            )
        ):
            return groups, weights.__getitem__
        weights = {s: s() for a in here if a is not None for s in a.stacks.values()}
        groups = group_members(adapters, members.table, weights.__getitem__)
        self._kept = (members.table, here, weights, groups)
        return groups, weights.__getitem__


def member_edits(
    groups: Sequence[MemberGroup],
    weights_of: WeightsOf,
    members: Members,
    window: Window,
    selections: Mapping[PositionRule, Selection | None],
) -> dict[int, list[Edit]]:
    """The edits of each site: one for each group with an adapter in the batch.

    Args:
        groups: the groups.
        weights_of: returns the weights of all layers of a stack.
        members: the adapter of each example.
        window: the part of the batch that the forward processes.
        selections: the rows of the whole batch that each rule selects, or None.
    """
    edits: dict[int, list[Edit]] = {}
    numbers = members.numbers(window)
    tokens = TokenShape(window.batch, window.width)
    named = members.named()
    for group in groups:
        here = [m for m in group.members if m.name in named and selections[m.rule] is not None]
        if not here:
            continue
        source: Intervention | Bank
        if len(here) == 1:
            (member,) = here
            source, indices, weights = member.stack, member.indices, weights_of(member.stack)
            first_sets, sets = None, source.num_sets or 1
        else:
            source, weights = group.bank(weights_of)
            indices, sets = list(range(len(group.sites))), source.num_sets
            first_sets = dict(zip([m.name for m in group.members], source.first_sets, strict=True))
        selection = _selection(window, members.table, numbers, here, selections, first_sets, sets)
        if window.call.scaling is not None:
            rank = rank_of(weights[indices[0]])
            selection = scaled_selection(selection, window, window.call.scaling, rank, sets)
        device = next(here[0].stack.parameters()).device
        for index, site in zip(indices, group.sites, strict=True):
            edit = Edit(source, index, weights[index], selection, tokens, device)
            edits.setdefault(site, []).append(edit)
    return edits


def _selection(
    window: Window,
    table: tuple[str, ...],
    numbers: Tensor,
    here: Sequence[Member],
    selections: Mapping[PositionRule, Selection | None],
    first_sets: Mapping[str, int] | None,
    sets: int,
) -> Selection:
    """The rows that the adapters ``here`` edit, with their weight ids."""
    place = {name: number for number, name in enumerate(table)}
    by_rule: dict[PositionRule, list[int]] = {}
    for member in here:
        by_rule.setdefault(member.rule, []).append(place[member.name])
    parts = []
    for rule, chosen in by_rule.items():
        selection = selections[rule]
        assert selection is not None
        serves = [number in chosen for number in range(len(table) + 1)]
        parts.append((selection, torch.tensor(serves, device=window.device)[numbers]))
    first = None
    if first_sets is not None:
        offsets = [first_sets.get(name, 0) for name in table] + [0]
        first = torch.tensor(offsets, dtype=torch.int32, device=window.device)[numbers]
    return join_selections(window, parts, first, sets)


def check_members(
    checks: PromptChecks,
    members: Members,
    names: Sequence[str],
    rule: PositionRule,
    window: Window,
    mode: Mode,
) -> None:
    """Check a rule on the examples whose adapters have it.

    Args:
        checks: the checks of the model.
        members: the adapter of each example.
        names: the adapters with the rule.
        rule: the positions that they edit.
        window: the part of the batch that the forward processes.
        mode: how the forward runs.
    """
    if (
        torch.compiler.is_compiling()  # the names are not known here
        or window.generation is not None  # which knows where its prompts end
        or window.call.is_explicit
    ):
        return
    part = window.of_examples(members.examples(names, window.batch))
    checks.check(part, rule, select(part, rule) if mode.training else None, mode)
