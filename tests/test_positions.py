"""Tests of position specs, masks and packed batches, with a simple Python implementation."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels import positions
from reft_kernels.positions import (
    Spec,
    from_indices,
    from_mask,
    parse,
    prompt_rows,
    resolve,
    resolve_packed,
    weight_ids,
)

T = 8

# spec, prompt length -> columns of one example with 8 columns and no left padding, as in pyreft
TABLE = [
    ("f2+l2", 8, [0, 1, 6, 7]),
    ("f2+l2", 5, [0, 1, 3, 4]),
    ("f2+l2", 4, [0, 1, 2, 3]),
    ("f2+l2", 3, [0, -1, 2, -1]),
    ("f2+l2", 2, [0, -1, 1, -1]),
    ("f2+l2", 1, [-1, -1, -1, -1]),
    ("f2+l2", 0, [-1, -1, -1, -1]),
    ("f1+l3", 5, [0, 3, 4, -1]),
    ("l3+f1", 5, [0, 3, 4, -1]),
    ("f3+l1", 4, [0, 1, -1, 3]),
    ("f3", 5, [0, 1, 2]),
    ("f3", 2, [0, 1, -1]),
    ("f3", 0, [-1, -1, -1]),
    ("l1", 5, [4]),
    ("l3", 5, [2, 3, 4]),
    ("l3", 2, [0, 1, -1]),
    ("l1", 0, [-1]),
    ("prompt", 3, [0, 1, 2, -1, -1, -1, -1, -1]),
    ("prompt", 0, [-1] * 8),
    ("all", 3, [0, 1, 2, 3, 4, 5, 6, 7]),
]


@pytest.mark.parametrize(("spec", "length", "columns"), TABLE, ids=str)
def test_spec(spec, length, columns):
    rows = resolve(spec, [length], T)
    assert rows.dtype == torch.int32 and rows.tolist() == columns


@pytest.mark.parametrize(("spec", "length", "columns"), TABLE, ids=str)
def test_second_example_and_left_padding(spec, length, columns):
    """The rows of the second example start at T, and prompts are padded on the left by two.

    Without a mask, a left-padded prompt ends at the last column.
    """
    if spec in ("f2+l2", "f1+l3", "l3+f1", "f3+l1", "f3", "l3", "l1", "prompt") and length <= T - 2:
        mask = torch.ones(2, T, dtype=torch.int64)
        mask[1, :2] = 0
        rows = resolve(spec, [0, length], T, padding_side="left", attention_mask=mask).view(2, -1)
        shifted = {T + 2 + c for c in columns if c >= 0}
        assert {r for r in rows[1].tolist() if r >= 0} == shifted
        assert set(rows[0].tolist()) == {-1}
    unmasked = resolve(spec, [length], T, padding_side="left").tolist()
    if spec == "all":
        assert unmasked == list(range(T))
    else:
        assert {r for r in unmasked if r >= 0} == {c + T - length for c in columns if c >= 0}


def test_all_leaves_out_padding():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert resolve("all", [1, 1], 3, attention_mask=mask).tolist() == [-1, 1, 2, 3, 4, -1]


@pytest.mark.parametrize("spec", ["F2 + L2", "f2+l2", " f2+ l2 "])
def test_spelling(spec):
    assert parse(spec) == Spec("ends", 2, 2)
    assert parse(spec).per_example == 4 and parse("all").per_example is None


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "f",
        "f0",
        "f-1",
        "f1+f2",
        "f1+l2+l3",
        "x3",
        "f1l2",
        "first",
        "f1+",
        "7",
        "f1.5",
        "all+f1",
    ],
)
def test_a_spec_that_does_not_parse(spec):
    with pytest.raises(ValueError, match="^positions: got .*, expected 'fN', 'lN', 'fN\\+lM'"):
        resolve(spec, [1], 4)


def test_specs_of_a_modality():
    assert parse("text:f2+l2") == Spec("ends", 2, 2, modality="text")
    assert parse(" Image ") == parse("image:prompt") == Spec("prompt", modality="image")
    assert parse("text:all") == Spec("all", modality="text")
    with pytest.raises(
        ValueError, match="expected one of text, image, video, audio before a colon"
    ):
        parse("picture:f1")
    for spec in ("text:", "text:image", "text:text:f1", "f1+image:l1"):
        with pytest.raises(ValueError, match="^positions: got"):
            parse(spec)
    with pytest.raises(ValueError, match="pyreft_positions: got True .* pyreft counts all tokens"):
        parse("text:l1").as_pyreft()
    with pytest.raises(ValueError, match="text tokens are told from others by their ids"):
        resolve("text:l1", [1], 4)
    with pytest.raises(ValueError, match="image tokens are told from others by their ids"):
        resolve_packed("image:l1", [0, 4])


# comparison with a simple Python implementation


def _slow(spec: str, starts, lengths, width, real=None, offset=0, strides=None) -> list[int]:
    parsed, rows = parse(spec), []
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        first_row = i * width if strides is None else strides[i]
        prompt = list(range(start, start + length))
        if parsed.kind == "ends":
            limit = length // 2 if parsed.first and parsed.last else length
            f, la = min(parsed.first, limit), min(parsed.last, limit)
            chosen = (
                prompt[:f]
                + [None] * (parsed.first - f)
                + prompt[length - la :]
                + [None] * (parsed.last - la)
            )
            inside = [c is not None and 0 <= c - offset < width for c in chosen]
            rows += [
                first_row + c - offset if ok else -1 for c, ok in zip(chosen, inside, strict=True)
            ]
        elif parsed.kind == "prompt":
            rows += [first_row + c if c + offset in prompt else -1 for c in range(width)]
        else:
            rows += [first_row + c if real is None or real[i][c] else -1 for c in range(width)]
    return rows


_SPECS = st.one_of(
    st.sampled_from(["all", "prompt"]),
    st.builds("f{}+l{}".format, st.integers(1, 6), st.integers(1, 6)),
    st.builds("{}{}".format, st.sampled_from("fl"), st.integers(1, 9)),
)


@st.composite
def _batches(draw):
    width = draw(st.integers(0, 9))
    examples = draw(
        st.lists(
            st.integers(0, width).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
            max_size=4,
        )
    )
    return width, [tokens for tokens, _ in examples], [prompt for _, prompt in examples]


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    spec=_SPECS, batch=_batches(), side=st.sampled_from(["left", "right"]), masked=st.booleans()
)
def test_resolve_against_slow(spec, batch, side, masked):
    width, tokens, lengths = batch
    starts = [0] * len(tokens)
    mask = None
    if masked:
        mask = torch.zeros(len(tokens), width, dtype=torch.int64)
        for i, n in enumerate(tokens):
            starts[i] = width - n if side == "left" and n else 0
            mask[i, starts[i] : starts[i] + n] = 1
    elif side == "left":
        starts = [width - n for n in lengths]
    got = resolve(
        spec,
        torch.tensor(lengths, dtype=torch.int64),
        width,
        padding_side=side,
        attention_mask=mask,
    )
    assert got.tolist() == _slow(
        spec, starts, lengths, width, None if mask is None else mask.bool().tolist()
    )
    chosen = got[got >= 0]
    assert chosen.unique().numel() == chosen.numel() and (chosen < len(tokens) * width).all()


@hypothesis.settings(max_examples=200)
@hypothesis.given(spec=_SPECS, batch=_batches(), cut=st.integers(0, 9))
def test_chunks_of_a_prefill_cover_the_whole_once(spec, batch, cut):
    """Two chunks of a prefill edit the same rows as the whole prefill."""
    width, _, lengths = batch
    cut = min(cut, width)
    parsed, starts, n = (
        parse(spec),
        torch.zeros(len(lengths), dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
    )
    for offset, chunk in ((0, cut), (cut, width - cut)):
        got = prompt_rows(parsed, starts, n, chunk, offset=offset)
        assert got.tolist() == _slow(spec, [0] * len(lengths), lengths, chunk, offset=offset)


@hypothesis.given(
    spec=_SPECS.filter(lambda s: s not in ("all", "prompt")),
    sizes=st.lists(st.integers(0, 7), max_size=4),
    whole=st.booleans(),
)
def test_packed_against_slow(spec, sizes, whole):
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    lengths = sizes if whole else [n // 2 for n in sizes]
    got = resolve_packed(spec, offsets, None if whole else lengths)
    assert got.tolist() == _slow(spec, [0] * len(sizes), lengths, 10, strides=offsets)


# indices, masks and labels


def test_from_indices():
    assert from_indices(torch.tensor([[0, -1], [2, 1]]), 3).tolist() == [0, -1, 5, 4]
    for index, message in [
        (torch.tensor([[0, 3]]), r"^index: got columns from 0 to 3, expected \[0, 3\)"),
        (torch.tensor([[-2, 0]]), "^index: got columns from -2 to 0, expected"),
        (torch.tensor([[1, 1]]), "^index: row 1 occurs more than once"),
        (torch.tensor([1, 1]), r"^index: got shape \(2,\).*expected an integer tensor \[B, P\]"),
        (torch.tensor([[1.0]]), "^index: got .*torch.float32.*expected an integer tensor"),
        ([[1]], "^index: got list"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_indices(index, 3)


def test_from_mask():
    mask = torch.tensor([[True, False], [False, True]])
    assert from_mask(mask).tolist() == from_mask(mask.flatten()).tolist() == [0, -1, -1, 3]
    for wrong in (mask.long(), mask[None], [True]):
        with pytest.raises(ValueError, match="^mask: got .*expected a bool tensor"):
            from_mask(wrong)


def test_set_ids():
    assert weight_ids("f2+l1", 2).tolist() == [0, 0, 1, 0, 0, 1]
    for spec in ("f2", "l2", "all", "prompt"):
        with pytest.raises(
            ValueError, match="^positions: got .*untied weights need first and last"
        ):
            weight_ids(spec, 2)


def test_prompt_lengths_from_labels():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, 8], [-100] * 4, [1, 2, 3, 4]])
    assert positions.prompt_lengths_from_labels(labels).tolist() == [2, 1, 4, 0]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert positions.prompt_lengths_from_labels(labels, mask).tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resolve(7, [1], 4), TypeError, "^positions: got int 7, expected a string"),
        (
            lambda: resolve("f1", [5], 4),
            ValueError,
            "^prompt_lengths: got 5 for example 0, expected 0 to 4, seq_len",
        ),
        (
            lambda: resolve("f1", [1, -1], 4),
            ValueError,
            "^prompt_lengths: got -1 for example 1, expected 0 to 4",
        ),
        (
            lambda: resolve("f1", [1.5], 4),
            ValueError,
            "^prompt_lengths: got .*expected one integer for each example",
        ),
        (lambda: resolve("f1", [[1]], 4), ValueError, "^prompt_lengths: got shape"),
        (lambda: resolve("f1", [1], -1), ValueError, "^seq_len: got -1, expected an integer >= 0"),
        (lambda: resolve("f1", [1], 4.0), ValueError, "^seq_len: got 4.0, expected"),
        (
            lambda: resolve("f1", [1], 4, padding_side="up"),
            ValueError,
            "^padding_side: got 'up', expected 'right' or 'left'",
        ),
        (
            lambda: resolve("f1", [1], 4, attention_mask=torch.ones(1, 3)),
            ValueError,
            r"^attention_mask: got .*\(1, 4\)",
        ),
        (
            lambda: resolve("f1", [3], 4, attention_mask=torch.tensor([[1, 1, 0, 0]])),
            ValueError,
            "^prompt_lengths: got 3 for example 0, expected 0 to 2, the example's tokens by "
            "attention_mask",
        ),
        (
            lambda: resolve_packed("all", [0, 2]),
            ValueError,
            "^positions: got 'all' for a packed batch",
        ),
        (
            lambda: resolve_packed("f1", [1, 2]),
            ValueError,
            r"^cu_seqlens: got \[1, 2\], expected offsets that start at 0",
        ),
        (lambda: resolve_packed("f1", [0, 3, 2]), ValueError, "^cu_seqlens: got .*do not decrease"),
        (
            lambda: resolve_packed("f1", [0, 3], [1, 1]),
            ValueError,
            "^prompt_lengths: got 2 examples, expected 1",
        ),
        (
            lambda: resolve_packed("f1", [0, 3], [4]),
            ValueError,
            "^prompt_lengths: got 4 for example 0, expected 0 to 3",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_prompt_rows_neither_copies_nor_synchronises():
    """prompt_rows runs only operators on the tensor's device and reads no value on the host."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._schema.name not in (
                "aten::_local_scalar_dense",
                "aten::item",
                "aten::nonzero",
                "aten::is_nonzero",
            )
            return function(*args, **(kwargs or {}))

    starts, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 4])
    for spec in ("f2+l2", "prompt", "all"):
        with Calls():
            prompt_rows(parse(spec), starts, lengths, 5)
