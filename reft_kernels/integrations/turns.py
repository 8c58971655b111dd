"""Expansion of conversations with several responses to one row per response.

The expansion is needed because ReFT edits one prompt per row. Use it with
``datasets.Dataset.map(expand_turns, batched=True)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IGNORED = -100  # the label that the loss ignores
_LAYOUTS = "'messages', or 'input_ids' and 'labels'"


def expand_turns(batch: Mapping[str, Any], *, prompt_completion: bool = False) -> dict[str, list]:
    """Expand each row of a batch to one row per response.

    A batch with a column ``messages`` (lists of ``{"role": ..., "content": ...}``) gives one row
    per assistant turn, with the messages up to and including that turn.

    A batch with ``input_ids`` and ``labels`` gives one row per supervised span, a run of labels
    other than -100. The row is truncated after the span, and labels before the span are set to
    -100. Lists of numbers as long as ``input_ids`` (``attention_mask``, ``position_ids``) are
    truncated at the same position.

    All other columns are repeated. A row without an assistant turn or supervised token is dropped.
    Rows must be expanded before they are packed.

    Args:
        batch: The columns of a batch, or of a single example.
        prompt_completion: Return TRL's columns ``prompt`` (the messages before the turn) and
            ``completion`` (a list with the turn) instead of ``messages``. ``Dataset.map`` then also
            needs ``remove_columns="messages"``.

    Returns:
        The columns of the new batch.

    Raises:
        TypeError: If ``batch`` is not a mapping or a column has values of the wrong type.
        ValueError: If the batch has neither ``messages`` nor ``input_ids`` and ``labels``, or all
            of them; if columns differ in length; or if a row is packed.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: got {_named(batch)}, expected a dict of columns")
    columns = {name: _plain(batch[name]) for name in batch}
    chat, tokens = "messages" in columns, "input_ids" in columns and "labels" in columns
    if chat == tokens:
        raise ValueError(f"batch: got columns {_listed(columns)}, expected {_LAYOUTS}")
    if prompt_completion and not chat:
        raise ValueError("prompt_completion: got True for a batch of 'labels', expected 'messages'")
    columns = _as_batch(columns, "messages" if chat else "input_ids")
    if chat:
        return _chats(columns, prompt_completion)
    return _tokens(columns)


# ---- Messages


def _chats(columns: dict[str, list], prompt_completion: bool) -> dict[str, list]:
    other_columns = [name for name in columns if name != "messages"]
    new_columns = ["prompt", "completion"] if prompt_completion else ["messages"]
    if clash := [name for name in new_columns if name in other_columns]:
        raise ValueError(
            f"batch: got column {clash[0]!r} beside 'messages', which would replace it"
        )
    rows: dict[str, list] = {name: [] for name in [*new_columns, *other_columns]}
    for number, messages in enumerate(columns["messages"]):
        for turn in _turns(messages, f"messages, row {number}"):
            if prompt_completion:
                rows["prompt"].append(messages[:turn])
                rows["completion"].append([messages[turn]])
            else:
                rows["messages"].append(messages[: turn + 1])
            for name in other_columns:
                rows[name].append(columns[name][number])
    return rows


def _turns(messages: Any, where: str) -> list[int]:
    """Return the indices of the assistant's messages."""
    if not isinstance(messages, list):
        raise TypeError(f"{where}: got {_named(messages)}, expected a list of messages")
    turns = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            text = _named(message)
            raise TypeError(f"{where}, message {place}: got {text}, expected a dict with role")
        if not isinstance(message.get("role"), str):
            text = _listed(message)
            raise ValueError(f"{where}, message {place}: got keys {text}, expected 'role', a str")
        if message["role"] == "assistant":
            turns.append(place)
    return turns


# ---- Tokens


def _tokens(columns: dict[str, list]) -> dict[str, list]:
    for name in ("seq_lengths", "cu_seqlens", "cu_seq_lens_q"):
        if name in columns:
            raise ValueError(f"batch: got packed rows ({name!r}), expected rows before packing")
    ids = columns["input_ids"]
    for number, (row, labels) in enumerate(zip(ids, columns["labels"], strict=True)):
        _check_ids(row, f"input_ids, row {number}")
        _check_ids(labels, f"labels, row {number}")
        if len(labels) != len(row):
            raise ValueError(f"labels, row {number}: got {len(labels)} for {len(row)} input_ids")
    aligned = [name for name in columns if all(map(_aligned, columns[name], ids))]
    rows: dict[str, list] = {name: [] for name in columns}
    for number in range(len(ids)):
        _refuse_packed(columns, number)
        labels = columns["labels"][number]
        for start, end in _spans(labels):
            for name, values in columns.items():
                value = values[number]
                rows[name].append(value[:end] if name in aligned else value)
            rows["labels"][-1] = [IGNORED] * start + labels[start:end]
    return rows


def _spans(labels: list[int]) -> list[tuple[int, int]]:
    """Return the start and end of each run of supervised labels."""
    spans: list[tuple[int, int]] = []
    for place, label in enumerate(labels):
        if label == IGNORED:
            continue
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def _check_ids(row: Any, where: str) -> None:
    if not isinstance(row, list):
        raise TypeError(f"{where}: got {_named(row)}, expected a list of integers")
    for value in row:
        if not isinstance(value, int):
            raise TypeError(f"{where}: got {_named(value)} in it, expected a list of integers")


def _aligned(value: Any, row: list) -> bool:
    """Return whether ``value`` is a list of numbers as long as ``row``."""
    if not isinstance(value, list) or len(value) != len(row):
        return False
    return all(isinstance(part, int | float) for part in value)


def _refuse_packed(columns: dict[str, list], number: int) -> None:
    """Raise ValueError if the position ids of a row restart, as in a packed row."""
    places = columns.get("position_ids", [None] * (number + 1))[number]
    if not _aligned(places, columns["input_ids"][number]):
        return
    mask = columns.get("attention_mask", [None] * (number + 1))[number]
    if _aligned(mask, places):
        places = [place for place, real in zip(places, mask, strict=True) if real]
    if any(after < before for before, after in zip(places, places[1:], strict=False)):
        raise ValueError(
            f"position_ids, row {number}: got several sequences, expected rows before packing"
        )


# ---- Common helpers


def _as_batch(columns: dict[str, Any], leading: str) -> dict[str, list]:
    """Return the columns as a batch, after a check that they have the same length.

    A single example becomes a batch of one.
    """
    value = columns[leading]
    if not isinstance(value, list):
        raise TypeError(f"{leading}: got {_named(value)}, expected a list")
    if value and isinstance(value[0], Mapping | int):
        return {name: [value] for name, value in columns.items()}
    for name, column in columns.items():
        if not isinstance(column, list):
            raise TypeError(
                f"{name}: got {_named(column)}, expected a list, one value for each row"
            )
        if len(column) != len(value):
            raise ValueError(
                f"{name}: got {len(column)} rows, expected {len(value)} as {leading!r}"
            )
    return columns


def _plain(value: Any) -> Any:
    """Convert tensors and arrays, also those in a list, to lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [part.tolist() if hasattr(part, "tolist") else part for part in value]
    return value


def _named(value: Any) -> str:
    """Format a value and its type for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
