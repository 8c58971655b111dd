"""Response templates from chat templates and from texts, with small tokenizers of each kind.

Also the examples of docs/positions.md.
"""

from __future__ import annotations

import pytest
import torch

from reft_kernels.integrations.response_template import (
    checked_template,
    from_chat_template,
    template_of_text,
)
from tests.pages import DOCS, python_blocks, run_page
from tests.tiny_chat import CHATML, GEMMA, LLAMA2, LLAMA3, THINKING, chat_tokenizer, save_chat_model


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA2, " [/INST]"),
        (LLAMA3, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        (GEMMA, "<end_of_turn>\n<start_of_turn>model\n"),
        (THINKING, "<|im_end|>\n<|im_start|>assistant\n"),
    ],
    ids=["chatml", "llama2", "llama3", "gemma", "thinking"],
)
def test_chat_templates(template, text):
    tokenizer = chat_tokenizer(template)
    ids = from_chat_template(tokenizer)
    assert tokenizer.decode(ids) == text
    for question, answer in (("Name a fruit", "An apple"), ("the answer?\n", "is yes")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
        ends = [c + len(ids) for c in range(len(row)) if row[c : c + len(ids)] == ids]
        assert len(ends) == 1 and tokenizer.decode(row[ends[0] :]).strip().startswith(answer)


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"],
    ids=["none", "bare"],
)
def test_templates_without_an_answer_raise(template):
    with pytest.raises(ValueError, match="tokenizer: .*chat template"):
        from_chat_template(chat_tokenizer(template))


TEXTS = ("Answer:", "\nAnswer:", "Answer:\n", "the answer is", "[/INST]")
BEFORE = ("Name a fruit. ", "yes\n", "yes", "Question: the\n\n")
# without words that would be joined to one
PLACES = [
    (text, before)
    for text in TEXTS
    for before in BEFORE
    if not (text[0].isalpha() and before[-1].isalpha())
]


@pytest.mark.parametrize(("text", "before"), PLACES)
@pytest.mark.parametrize("after", [" An apple", "yes", "\nthe", "7"])
def test_texts_are_found_in_other_text(text, before, after):
    tokenizer = chat_tokenizer()
    whole = tokenizer(before + text + after, return_offsets_mapping=True)
    row, offsets = whole.input_ids, whole.offset_mapping
    forms = template_of_text(text, tokenizer)
    assert checked_template((text, tokenizer)) == forms
    ends = {
        offsets[c + len(f) - 1][1]
        for f in forms
        for c in range(len(row))
        if row[c : c + len(f)] == f
    }
    assert ends == {len(before) + len(text)}


def test_texts_that_cannot_end_a_prompt():
    tokenizer = chat_tokenizer()
    with pytest.raises(
        ValueError, match="expected it without the space at its end: 'the answer is'"
    ):
        template_of_text("the answer is ", tokenizer)
    with pytest.raises(ValueError, match="response_template: got an empty text"):
        template_of_text("", tokenizer)
    with pytest.raises(ValueError, match="a text needs its tokenizer"):
        checked_template("Answer:")


def test_the_page_on_positions_runs(tmp_path):
    page = DOCS / "positions.md"
    assert len(python_blocks(page)) >= 5
    run_page(
        page, {"__name__": "positions_page", "torch": torch, "name": str(save_chat_model(tmp_path))}
    )
