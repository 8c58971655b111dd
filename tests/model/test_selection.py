"""Rows for each layout of the hidden state, compared with plain indexing; other shapes raise."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.model.selection import Selection, TokenShape, place_rows

BATCH, WIDTH, STREAMS, D = 3, 5, 4, 2
CHOSEN = [(0, 0), (0, 4), (1, 2), (2, 3)]
TOKENS = TokenShape(BATCH, WIDTH)


def rows(with_gap: bool = True) -> torch.Tensor:
    numbers = [b * WIDTH + t for b, t in CHOSEN]
    return torch.tensor([*numbers, -1] if with_gap else numbers, dtype=torch.int32)


def edited_places(hidden: torch.Tensor, selection: Selection) -> set[tuple[int, ...]]:
    flat = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.bool)
    chosen = flat if selection.rows is None else selection.rows[selection.rows >= 0].long()
    flat[:] = selection.rows is None
    flat[chosen] = True
    return {tuple(place) for place in flat.view(hidden.shape[:-1]).nonzero().tolist()}


@pytest.mark.parametrize(
    ("layout", "shape", "place"),
    [
        ("btd", (BATCH, WIDTH), lambda b, t: [(b, t)]),
        ("btd", (BATCH * WIDTH,), lambda b, t: [(b * WIDTH + t,)]),
        ("btd_padded", (BATCH, WIDTH), lambda b, t: [(b, t)]),
        ("btd_padded", (BATCH, WIDTH + 3), lambda b, t: [(b, t)]),
        ("tbd", (WIDTH, BATCH), lambda b, t: [(t, b)]),
        ("btsd", (BATCH, WIDTH, STREAMS), lambda b, t: [(b, t, s) for s in range(STREAMS)]),
        ("sbtd", (STREAMS, BATCH, WIDTH), lambda b, t: [(s, b, t) for s in range(STREAMS)]),
    ],
    ids=lambda value: str(value) if isinstance(value, str | tuple) else "",
)
def test_layouts(layout, shape, place):
    hidden = torch.zeros(*shape, D)
    expected = {where for b, t in CHOSEN for where in place(b, t)}
    ids = torch.arange(len(CHOSEN) + 1, dtype=torch.int32) % 2
    placed = place_rows(Selection(rows(), ids), TOKENS, hidden, layout)
    assert edited_places(hidden, placed) == expected
    assert placed.weight_ids.shape == placed.rows.shape
    for row, set_id in zip(placed.rows.tolist(), placed.weight_ids.tolist(), strict=True):
        if row >= 0:
            where = tuple(
                torch.zeros(shape)
                .flatten()
                .scatter(0, torch.tensor(row), 1)
                .view(shape)
                .nonzero()[0]
                .tolist()
            )
            (index,) = [i for i, (b, t) in enumerate(CHOSEN) if where in place(b, t)]
            assert set_id == index % 2
    everything = place_rows(Selection(None, None), TOKENS, hidden, layout)
    every = {where for b in range(BATCH) for t in range(WIDTH) for where in place(b, t)}
    assert edited_places(hidden, everything) == every


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("btd", (BATCH, WIDTH + 1)),
        ("btd", (BATCH, WIDTH - 1)),
        ("btd", (WIDTH, BATCH)),
        ("btd", (BATCH + 1, WIDTH)),
        ("btd", (BATCH * WIDTH - 1,)),
        ("btd", (BATCH, WIDTH, 1)),
        ("btd", ()),
        ("btd_padded", (BATCH, WIDTH - 1)),
        ("btd_padded", (BATCH + 1, WIDTH)),
        ("tbd", (BATCH, WIDTH)),
        ("btsd", (BATCH, WIDTH)),
        ("btsd", (STREAMS, BATCH, WIDTH)),
        ("sbtd", (BATCH, WIDTH, STREAMS)),
        ("sbtd", (BATCH, WIDTH)),
    ],
    ids=str,
)
def test_any_other_tensor_is_refused(layout, shape):
    assert place_rows(Selection(rows(), None), TOKENS, torch.zeros(*shape, D), layout) is None
    assert place_rows(Selection(None, None), TOKENS, torch.zeros(*shape, D), layout) is None
