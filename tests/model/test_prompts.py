"""Prompt ends and the rows of positions, compared with plain loops."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import positions
from reft_kernels.model.generation import Generation
from reft_kernels.model.modalities import CountedTokens
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.prompts import compute_prompt_window
from reft_kernels.model.selection import PositionRule, select
from tests.model.families import mask_of

WIDTH = 12


def rows(
    spec,
    arguments,
    *,
    explicit=None,
    generation=None,
    untied=False,
    token_labels=True,
    decoder=False,
):
    explicit = explicit or ModelCall()
    window = compute_prompt_window(
        arguments, explicit, generation, token_labels=token_labels, decoder=decoder
    )
    parsed = positions.parse(spec)
    counted = None if parsed.modality is None else CountedTokens(parsed.modality, (90,))
    selection = select(window, PositionRule(parsed, untied, counted=counted))
    if selection is None:
        return None
    chosen = None if selection.rows is None else [r for r in selection.rows.tolist() if r >= 0]
    if not untied:
        return chosen
    return [
        (r, s)
        for r, s in zip(selection.rows.tolist(), selection.weight_ids.tolist(), strict=True)
        if r >= 0
    ]


def tokens(batch=2, width=WIDTH):
    return {"input_ids": torch.ones(batch, width, dtype=torch.int64)}


def labels_from(starts, width=WIDTH):
    labels = torch.ones(len(starts), width, dtype=torch.int64)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    return labels


# positions (temporal, vertical, horizontal): text, an image of 2 by 2 rows, text; then text alone
THREE = torch.tensor(
    [
        [0, 1, 2, 2, 2, 2, 4, 5, 0, 1, 2, 3],
        [0, 1, 2, 2, 3, 3, 4, 5, 0, 1, 2, 3],
        [0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2, 3],
    ]
).unsqueeze(1)
FOUR = torch.cat([torch.tensor([[*range(8), *range(4)]]).unsqueeze(0), THREE])
IDS = torch.tensor([[5, 5, 90, 90, 90, 90, 5, 5, 5, 5, 5, 5]])
# two sequences that begin with an image; the first is an image alone
IMAGES = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 4, 5],
        [0, 0, 1, 1, 0, 0, 1, 1, 2, 3, 4, 5],
        [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5],
    ]
).unsqueeze(1)


@pytest.mark.parametrize("ids", [THREE, FOUR], ids=["three rows", "four rows"])
def test_packed_sequences_with_positions_of_images(ids):
    arguments, explicit = {"input_ids": IDS}, ModelCall(position_ids=ids)
    assert rows("f1+l1", arguments, explicit=explicit) == [0, 7, 8, 11]
    explicit = explicit._replace(labels=labels_from([6]))
    explicit.labels[0, 8:10] = -100
    assert rows("l2", arguments, explicit=explicit) == [4, 5, 8, 9]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("text:f2+l2", [0, 1, 6, 7, 8, 9, 10, 11]),
        ("text:l3", [1, 6, 7, 9, 10, 11]),
        ("text:f3", [0, 1, 6, 8, 9, 10]),
        ("image:f1+l2", [2, 4, 5]),
        ("image", [2, 3, 4, 5]),
        ("text:all", [0, 1, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_packed_sequences_count_the_tokens_of_a_modality(spec, expected):
    explicit = ModelCall(position_ids=THREE)
    assert rows(spec, {"input_ids": IDS}, explicit=explicit) == expected
    assert rows(
        spec,
        {"input_ids": IDS.repeat(2, 1)},
        explicit=ModelCall(position_ids=THREE.repeat(1, 2, 1)),
    ) == expected + [r + WIDTH for r in expected]


def test_untied_weights_of_a_modality():
    explicit = ModelCall(position_ids=THREE)
    expected = [(0, 0), (7, 1), (8, 0), (11, 1)]
    assert rows("text:f1+l1", {"input_ids": IDS}, explicit=explicit, untied=True) == expected
    assert rows("text:f1+l1", {"input_ids": IDS}, untied=True) == [(0, 0), (11, 1)]
    assert rows("image:f1+l1", {"input_ids": IDS}, untied=True) == [(2, 0), (5, 1)]


def test_sequences_that_begin_with_an_image():
    ids = torch.where(torch.arange(WIDTH) < 8, 90, 5).unsqueeze(0)
    explicit = ModelCall(position_ids=IMAGES)
    assert rows("f1+l1", {"input_ids": ids}, explicit=explicit) == [0, 3, 4, 11]
    assert rows("text:l1", {"input_ids": ids}, explicit=explicit) == [11]


def test_a_modality_needs_token_ids():
    with pytest.raises(ValueError, match="^positions: text tokens are told .* input_ids"):
        rows("text:l1", {"inputs_embeds": torch.ones(2, WIDTH, 3)})
    packed = ModelCall(position_ids=torch.arange(WIDTH).repeat(2, 1))
    with pytest.raises(ValueError, match="^positions: image tokens are told .* input_ids"):
        rows("image", {"inputs_embeds": torch.ones(2, WIDTH, 3)}, explicit=packed)


def test_nothing_known_is_all_prompt():
    assert rows("f1+l1", tokens()) == [0, 11, 12, 23]
    assert rows("all", tokens()) is None
    assert rows("f1+l1", {"inputs_embeds": torch.ones(2, WIDTH, 3)}) == [0, 11, 12, 23]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_mask_ends_a_prompt_on_either_side(side):
    arguments = {**tokens(), "attention_mask": mask_of([12, 5], side, WIDTH)}
    start = 12 + (0 if side == "right" else 7)
    assert rows("f2+l1", arguments) == [0, 1, 11, start, start + 1, start + 4]
    assert rows("prompt", arguments) == [*range(12), *range(start, start + 5)]
    assert rows("all", arguments) == [*range(12), *range(start, start + 5)]


def test_labels_end_a_prompt_where_they_are_token_labels():
    explicit = ModelCall(labels=labels_from([4, 7]))
    assert rows("l2", tokens(), explicit=explicit) == [2, 3, 17, 18]
    assert rows("l2", tokens(), explicit=explicit, token_labels=False) == [10, 11, 22, 23]
    assert rows("l2", tokens(), explicit=ModelCall(labels=torch.tensor([1, 0]))) == [10, 11, 22, 23]


def test_a_decoders_inputs_are_its_labels_shifted_by_one():
    explicit = ModelCall(labels=labels_from([0, 2]))
    assert rows("prompt", tokens(), explicit=explicit, decoder=True) == [0, 12, 13, 14]


def test_explicit_lengths_beat_labels_and_mask():
    explicit = ModelCall(labels=labels_from([4, 7]), prompt_lengths=[3, 2])
    arguments = {**tokens(), "attention_mask": mask_of([12, 5], "left", WIDTH)}
    assert rows("l1", arguments, explicit=explicit) == [2, 12 + 7 + 1]
    for lengths, message in (
        [[3, 6], "got 6 for example 1, expected 0 to 5"],
        [[-1, 2], "got -1 for example 0"],
    ):
        with pytest.raises(ValueError, match=f"prompt_lengths: {message}"):
            rows("l1", arguments, explicit=ModelCall(prompt_lengths=lengths))
    with pytest.raises(ValueError, match="prompt_lengths: got 3 examples, expected 2"):
        rows("l1", arguments, explicit=ModelCall(prompt_lengths=[1, 1, 1]))
    with pytest.raises(ValueError, match="prompt_lengths: got shape"):
        rows("l1", arguments, explicit=ModelCall(prompt_lengths=torch.ones(2)))


def test_explicit_positions_replace_the_spec():
    explicit = ModelCall(edit_positions=torch.tensor([[0, 5], [3, -1]]))
    assert rows("f7+l7", tokens(), explicit=explicit) == [0, 5, 15]
    assert rows("f7+l7", tokens(), explicit=explicit, untied=True) == [(0, 0), (5, 1), (15, 0)]
    mask = torch.zeros(2, WIDTH, dtype=torch.bool)
    mask[0, 2] = mask[1, 11] = True
    assert rows("l1", tokens(), explicit=ModelCall(edit_positions=mask)) == [2, 23]
    wrong = {
        "columns from 0 to 12": torch.tensor([[0], [12]]),
        "more than once": torch.tensor([[3, 3], [1, 2]]),
        "edit_positions: got shape": torch.ones(2, 2),
        "expected a mask": torch.ones(2, 13, dtype=torch.bool),
        "got 3 examples": torch.ones(3, 1, dtype=torch.int64),
    }
    for message, value in wrong.items():
        with pytest.raises(ValueError, match=message):
            rows("l1", tokens(), explicit=ModelCall(edit_positions=value))
    with pytest.raises(ValueError, match="share_weights=False halves them"):
        rows(
            "f1+l1",
            tokens(),
            explicit=ModelCall(edit_positions=torch.tensor([[1], [2]])),
            untied=True,
        )


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def test_a_cache_without_a_word_about_the_prompt_is_decoding():
    arguments = {
        **tokens(width=1),
        "past_key_values": Cache(11),
        "attention_mask": torch.ones(2, 12),
    }
    assert rows("f7+l7", arguments) is None
    assert rows("all", arguments) is None  # all rows
    window = compute_prompt_window(arguments, ModelCall(), None, token_labels=True, decoder=False)
    assert select(window, PositionRule(positions.parse("all"))).rows is None
    assert rows(
        "l1",
        {**tokens(width=4), "past_key_values": Cache(8)},
        explicit=ModelCall(prompt_lengths=[12, 10]),
    ) == [3, 5]


# with right padding, only the whole mask determines the end of the prompt
@pytest.mark.parametrize(("side", "known"), [("left", True), ("left", False), ("right", True)])
def test_chunks_of_a_generation_add_up_to_the_prompt(side, known):
    mask = mask_of([12, 5], side, WIDTH)
    whole = rows("f2+l3", {**tokens(), "attention_mask": mask})
    generation, edited = Generation(mask if known else None, WIDTH, ModelCall()), []
    for start in range(0, WIDTH, 5):
        width = min(5, WIDTH - start)
        arguments = {
            **tokens(width=width),
            "attention_mask": mask[:, : start + width],
            "past_key_values": Cache(start),
        }
        chosen = rows("f2+l3", arguments, generation=generation) or []
        edited += [(r // width) * WIDTH + start + r % width for r in chosen]
    assert sorted(edited) == sorted(whole)
    after = {**tokens(width=1), "attention_mask": torch.ones(2, 13), "past_key_values": Cache(12)}
    assert rows("f2+l3", after, generation=generation) is None


def test_beams_repeat_their_examples():
    mask = mask_of([12, 5], "left", WIDTH)
    generation = Generation(mask, WIDTH, ModelCall(prompt_lengths=[12, 4]))
    arguments = {**tokens(batch=6), "attention_mask": mask.repeat_interleave(3, dim=0)}
    assert rows("f1", arguments, generation=generation) == [0, 12, 24, 36 + 7, 48 + 7, 60 + 7]


@pytest.mark.parametrize("untied", [False, True])
def test_packed_sequences_each_have_their_prompt(untied):
    """Packed by position ids, without a mask: 6, 2 and 4 tokens with prompts of 4, 1 and 4."""
    sizes, prompts = [6, 2, 4], [4, 1, 4]
    position_ids = torch.cat([torch.arange(n) for n in sizes]).unsqueeze(0)
    labels = torch.ones(1, WIDTH, dtype=torch.int64)
    expected, start = [], 0
    for size, prompt in zip(sizes, prompts, strict=True):
        labels[0, start : start + prompt] = -100
        n = prompt // 2
        expected += [(start + c, 0) for c in range(min(1, n))]
        expected += [(start + prompt - min(2, n) + c, 1) for c in range(min(2, n))]
        start += size
    arguments = tokens(batch=1)
    call = ModelCall(position_ids=position_ids)  # from the user, not computed by the model
    got = rows("f1+l2", arguments, explicit=call._replace(labels=labels), untied=untied)
    assert sorted(got) == (sorted(expected) if untied else sorted(r for r, _ in expected))
    if not untied:
        with_lengths = rows("f1+l2", arguments, explicit=call._replace(prompt_lengths=prompts))
        assert with_lengths == got
        edited = rows("prompt", arguments, explicit=call._replace(labels=labels))
        assert edited == [0, 1, 2, 3, 6, 8, 9, 10, 11]


def test_images_have_no_tokens():
    images = {"pixel_values": torch.ones(1, 3, 4, 4)}
    window = compute_prompt_window(images, ModelCall(), None, token_labels=False, decoder=False)
    assert window is None
