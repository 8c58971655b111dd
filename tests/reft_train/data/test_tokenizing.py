"""Token ids of prompts and targets: what is learned, what is cut, and what special tokens stand
where.
"""

from __future__ import annotations

from functools import partial

import pytest
from reft_train.config import build
from reft_train.data import tokenizing
from reft_train.data.tokenizing import IGNORED, Encoder, tokenize_rows
from reft_train.errors import UserError
from reft_train.models import load_tokenizer
from reft_train.tasks.base import Classified, Example, Row, Task

from tests.reft_train.tiny import tokenizer_of


def _single(kind, example, tokenizer, max_length, where=None):
    return Encoder(Task(), tokenizer, kind, max_length).encode([example], [where])[0]


def prompt_ids(texts, tokenizer, max_length, kind="causal"):
    return Encoder(Task(), tokenizer, kind, 512).prompts(texts, max_length)


causal, seq2seq, classification = (
    partial(_single, kind) for kind in ("causal", "seq2seq", "classification")
)
EXAMPLE = Example("what is the correct answer?", "the correct answer is true", "true")
WITH_BOS = [True, False]


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _llama(bos=True):
    from tokenizers import processors

    tokenizer = tokenizer_of("llama")
    if not bos:  # the token exists and is not added, as in GPT-2's and Qwen's tokenizers
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
        assert tokenizer("a")["input_ids"] == _ids(tokenizer, "a")
    return tokenizer


class _Continue(Task):
    name, recipe = "continue", "none"

    def example(self, row, tokenizer=None):
        return Example(row.fields["prompt"], row.fields["target"], "")


class _Classify(Task):
    name, recipe, labels = "classify", "none", ("no", "yes")

    def classified(self, row):
        return Classified(row.fields["text"], row.fields.get("pair"), row.fields["label"])


@pytest.fixture
def dataset_of(tmp_path):
    """Tokenizes rows with a cache of its own."""

    def make(rows, task, tokenizer, kind, limit):
        return tokenize_rows(rows, Encoder(task, tokenizer, kind, limit), {}, tmp_path)

    return make


def _rows(fields):
    return [Row(row, f"row {number} of train.json") for number, row in enumerate(fields)]


@pytest.mark.parametrize("bos", WITH_BOS)
def test_the_target_and_its_eos_are_learned_and_the_prompt_is_not(bos):
    tokenizer = _llama(bos)
    before = [tokenizer.bos_token_id] if bos else []
    prompt, target = _ids(tokenizer, EXAMPLE.prompt), _ids(tokenizer, EXAMPLE.target)
    item = causal(EXAMPLE, tokenizer, 512)
    assert item.input_ids == [*before, *prompt, *target, tokenizer.eos_token_id]
    assert item.labels == [IGNORED] * (len(before) + len(prompt)) + [
        *target,
        tokenizer.eos_token_id,
    ]
    assert (item.cut_prompt, item.cut_target) == (0, 0)


@pytest.mark.parametrize("bos", WITH_BOS)
def test_a_prompt_is_cut_from_the_left_after_its_bos(bos):
    tokenizer = _llama(bos)
    whole = causal(EXAMPLE, tokenizer, 512)
    item = causal(EXAMPLE, tokenizer, len(whole.input_ids) - 3)
    before = int(bos)
    assert item.input_ids == whole.input_ids[:before] + whole.input_ids[before + 3 :]
    assert item.labels == whole.labels[3:]
    assert (item.cut_prompt, item.cut_target) == (3, 0)


def test_a_target_longer_than_the_limit_leaves_one_token_of_prompt_and_keeps_its_eos():
    tokenizer = _llama()
    item = causal(EXAMPLE, tokenizer, 4)
    target = _ids(tokenizer, EXAMPLE.target)
    assert item.input_ids == [tokenizer.bos_token_id, *target[:2], tokenizer.eos_token_id]
    assert item.labels == [IGNORED, *item.input_ids[1:]]
    assert item.cut_target == len(target) - 2
    assert item.cut_prompt == len(_ids(tokenizer, EXAMPLE.prompt))


@pytest.mark.parametrize("limit", range(2, 40))
def test_every_limit_is_kept_and_both_parts_are_there(limit):
    item = causal(EXAMPLE, _llama(), limit)
    assert len(item.input_ids) == len(item.labels) <= limit
    assert (
        item.labels[0] == IGNORED and item.labels[-1] == item.input_ids[-1] == _llama().eos_token_id
    )


def test_an_eos_that_the_target_ends_with_is_not_doubled():
    tokenizer = _llama()
    closed = Example(EXAMPLE.prompt, EXAMPLE.target + tokenizer.eos_token, "true")
    assert causal(closed, tokenizer, 512) == causal(EXAMPLE, tokenizer, 512)


@pytest.mark.parametrize("bos", WITH_BOS)
@pytest.mark.parametrize("limit", [512, 12])
def test_a_bos_that_a_chat_template_wrote_is_kept_and_not_doubled(bos, limit):
    templated = Example("<s>" + EXAMPLE.prompt, EXAMPLE.target, "true")
    assert causal(templated, _llama(bos), limit) == causal(EXAMPLE, _llama(bos=True), limit)


def test_the_prompt_has_the_same_tokens_when_its_answer_is_generated():
    tokenizer = _llama()
    item = causal(EXAMPLE, tokenizer, 512)
    assert prompt_ids([EXAMPLE.prompt], tokenizer, 512) == [
        [t for t, label in zip(item.input_ids, item.labels, strict=True) if label == IGNORED]
    ]


def test_a_prompt_to_generate_from_is_cut_from_the_left():
    tokenizer = _llama()
    (whole,) = prompt_ids([EXAMPLE.prompt], tokenizer, 512)
    assert prompt_ids([EXAMPLE.prompt, "one"], tokenizer, 5) == [
        whole[:1] + whole[-4:],
        *prompt_ids(["one"], tokenizer, 5),
    ]
    with pytest.raises(UserError, match="max_length: got 0, expected at least 1"):
        prompt_ids([EXAMPLE.prompt], tokenizer, 0)


def test_an_encoder_reads_the_prompt_with_its_special_tokens_and_a_decoder_learns_the_target():
    tokenizer = tokenizer_of("t5")
    item = seq2seq(EXAMPLE, tokenizer, 512)
    assert item.input_ids == tokenizer(EXAMPLE.prompt)["input_ids"]
    assert prompt_ids([EXAMPLE.prompt], tokenizer, 512, "seq2seq") == [item.input_ids]
    assert item.labels == [*_ids(tokenizer, EXAMPLE.target), tokenizer.eos_token_id]


def test_an_encoder_decoder_cuts_the_prompt_from_the_left_and_the_target_at_its_end():
    tokenizer = tokenizer_of("t5")
    whole, item = seq2seq(EXAMPLE, tokenizer, 512), seq2seq(EXAMPLE, tokenizer, 4)
    assert item.input_ids == whole.input_ids[-4:]
    assert item.labels == [*whole.labels[:3], tokenizer.eos_token_id]
    assert (item.cut_prompt, item.cut_target) == (len(whole.input_ids) - 4, len(whole.labels) - 4)
    assert prompt_ids([EXAMPLE.prompt], tokenizer, 4, "seq2seq") == [item.input_ids]


def test_of_a_pair_the_longer_text_is_cut_first():
    tokenizer = tokenizer_of("bert")
    short, long = "true", "is the correct answer what " * 9
    item = classification(Classified(short, long, 1), tokenizer, 16)
    kept = _ids(tokenizer, short)
    assert len(item.input_ids) == 16 and item.labels == 1
    assert item.input_ids[1 : 1 + len(kept)] == kept
    assert item.token_type_ids == [0] * (len(kept) + 2) + [1] * (16 - len(kept) - 2)
    assert item.cut_prompt == len(tokenizer(short, long)["input_ids"]) - 16


@pytest.mark.parametrize("encode, kind", [(causal, "llama"), (seq2seq, "t5")])
@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_with_its_row(encode, kind, prompt):
    with pytest.raises(UserError, match="prompt of row 3 of train.json: got .*, expected text"):
        encode(Example(prompt, "true", "true"), tokenizer_of(kind), 16, where="row 3 of train.json")


@pytest.mark.parametrize("encode, kind", [(causal, "llama"), (seq2seq, "t5")])
def test_an_empty_target_is_refused_with_its_row(encode, kind):
    with pytest.raises(UserError, match="target of row 3 of train.json: got '', expected text"):
        encode(Example("what", "", "true"), tokenizer_of(kind), 16, where="row 3 of train.json")


def test_a_prompt_of_nothing_but_a_bos_is_refused():
    with pytest.raises(UserError, match="prompt: got '<s>', expected text"):
        causal(Example("<s>", "true", "true"), _llama(), 16)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = _llama()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="tokenizer: got a .* without an EOS token"):
        causal(EXAMPLE, tokenizer, 16)


def test_a_limit_without_room_for_both_parts_is_refused():
    with pytest.raises(UserError, match="max_length: got 1, expected at least 2"):
        causal(EXAMPLE, _llama(), 1)


def test_padding_falls_back_to_eos(tmp_path):
    def loaded(**tokens):
        for name, token in tokens.items():
            setattr(tokenizer, name, token)
        tokenizer.save_pretrained(tmp_path)
        return load_tokenizer(build({"model": str(tmp_path), "task": "jsonl"}))

    tokenizer = _llama()
    assert loaded().pad_token_id == tokenizer.pad_token_id
    assert loaded(pad_token=None).pad_token_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="expected a tokenizer with a padding or an EOS token"):
        loaded(eos_token=None)


@pytest.mark.parametrize(
    "kind, encode, family", [("causal", causal, "llama"), ("seq2seq", seq2seq, "t5")]
)
def test_rows_become_the_items_that_single_examples_do(
    monkeypatch, kind, encode, family, dataset_of
):
    monkeypatch.setattr(tokenizing, "_CHUNK", 3)  # the last chunk is not full
    tokenizer = tokenizer_of(family)
    fields = [
        {"prompt": "what is the answer? " * n, "target": "yes " * (10 - n)} for n in range(1, 9)
    ]
    dataset = dataset_of(_rows(fields), _Continue(), tokenizer, kind, 24)
    items = [encode(Example(row["prompt"], row["target"], ""), tokenizer, 24) for row in fields]
    assert dataset["input_ids"][:] == [item.input_ids for item in items]
    assert dataset["labels"][:] == [item.labels for item in items]
    assert dataset["length"][:] == [len(item.input_ids) for item in items]
    assert dataset["cut_prompt"][:] == [item.cut_prompt for item in items]
    assert dataset["cut_target"][:] == [item.cut_target for item in items]
    assert 0 < sum(cut > 0 for cut in dataset["cut_prompt"]) < len(items)


LIMITS = [("causal", "llama", True), ("causal", "llama", False), ("seq2seq", "t5", False)]


@pytest.mark.parametrize("kind, family, bos", LIMITS)
def test_rows_without_a_prompt_or_an_answer_are_dropped(kind, family, bos, dataset_of):
    tokenizer = _llama(bos) if family == "llama" else tokenizer_of(family)
    fields = [{"prompt": f"what is {n}?", "target": "yes " * n} for n in (1, 60, 2, 40)]
    items = list(Encoder(_Continue(), tokenizer, kind, 24).items(_rows(fields)))
    dropped = [kind == "causal" and n > 2 for n in (1, 60, 2, 40)]
    assert [item.lost for item in items] == dropped
    dataset = dataset_of(_rows(fields), _Continue(), tokenizer, kind, 24)
    kept = [item.input_ids for item in items if not item.lost]
    assert dataset["input_ids"][:] == kept


@pytest.mark.parametrize("encode, family", [(causal, "llama"), (seq2seq, "t5")])
@pytest.mark.parametrize("limit", range(2, 40))
def test_what_is_kept_has_text_of_both(encode, family, limit):
    tokenizer = tokenizer_of(family)
    item = encode(EXAMPLE, tokenizer, limit)
    if encode is causal:
        prompt = len([label for label in item.labels if label == IGNORED]) - 1
        target = len(item.labels) - 1 - prompt
    else:
        prompt, target = len(item.input_ids) - 1, len(item.labels)
    assert item.lost == (prompt < 1 or target < 2 or (encode is seq2seq and prompt == 1))


def test_rows_that_are_all_lost_are_refused(dataset_of):
    fields = [{"prompt": "what", "target": "yes " * 60}]
    with pytest.raises(
        UserError, match="max_length: got 8, which leaves no row both a prompt and an answer"
    ):
        dataset_of(_rows(fields), _Continue(), _llama(), "causal", 8)


@pytest.mark.parametrize("labels, values", [(("no", "yes"), [1, 0]), (None, [2.5, 4.0])])
def test_labels_are_class_numbers_or_numbers_to_predict(labels, values, dataset_of):
    task = _Classify()
    task.labels = labels
    rows = _rows([{"text": "yes", "pair": "no", "label": value} for value in values])
    dataset = dataset_of(rows, task, tokenizer_of("bert"), "classification", 24)
    assert dataset["labels"][:] == values and [type(v) for v in dataset["labels"]] == [
        type(v) for v in values
    ]
    assert dataset["token_type_ids"][0] == tokenizer_of("bert")("yes", "no")["token_type_ids"]


def test_a_tokenizer_without_types_gives_no_column_of_them(dataset_of):
    dataset = dataset_of(
        _rows([{"text": "yes", "label": 1}]),
        _Classify(),
        tokenizer_of("llama"),
        "classification",
        24,
    )
    assert "token_type_ids" not in dataset.column_names


@pytest.mark.parametrize(
    "fields, message",
    [
        ([], "data: got no rows"),
        (
            [{"prompt": "what", "target": "a"}, {"prompt": "", "target": "a"}],
            "prompt of row 1 of train.json: got ''",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(fields, message, dataset_of):
    with pytest.raises(UserError, match=message):
        dataset_of(_rows(fields), _Continue(), _llama(), "causal", 24)
