"""The text right before a response, as token ids: from a tokenizer's chat template, or from a
text of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_kernels.checks import describe

# what may stand before and after a template; tokenizers merge characters across its borders
_BEFORE = ("", "x", "x.", "x?", "x ", "x\n", "x\n\n")
_AFTER = ("", "x", " x", "X", " X", "1", "\nx")
_QUESTIONS = ("First question, about apples", "Another one entirely; of trains 7")
_ANSWERS = ("Zebra crossing", "indeed 42", "(perhaps)")


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    )


def checked_template(value: Any) -> list[list[int]]:
    """A template as a list of alternatives, each a list of token ids.

    Args:
        value: token ids, a list of such, or ``(text, tokenizer)``.

    Raises:
        ValueError: anything else, or an empty template.
    """
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return template_of_text(*value)
    if _is_ids(value):
        return [list(value)]
    if (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and value
        and all(_is_ids(ids) for ids in value)
    ):
        return [list(ids) for ids in value]
    hint = "; a text needs its tokenizer: (text, tokenizer)" if isinstance(value, str) else ""
    raise ValueError(
        f"response_template: got {describe(value)}, expected token ids such as [1, 4093, 198], a "
        "list of alternatives, or "
        f"(text, tokenizer){hint}"
    )


def template_of_text(text: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of ``text`` in the middle of other text: every form that its surroundings give
    it.

    Raises:
        ValueError: an empty text, or one with a space at its end; a tokenizer without character
            offsets; a text whose end is always joined with what follows.
    """
    if not text:
        raise ValueError(
            "response_template: got an empty text, expected what stands right before a response"
        )
    if text[-1] in " \t":  # tokenizers join it with the response's first word
        raise ValueError(
            f"response_template: got {text!r}, expected it without the space at its end: "
            f"{text.rstrip(' ' + chr(9))!r}"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"response_template: got a text with {type(tokenizer).__name__}, which gives no "
            "character offsets; "
            "expected token ids, or a fast tokenizer"
        )
    forms: list[list[int]] = []
    for before in _BEFORE:
        for after in _AFTER:
            form = _form(text, before, after, tokenizer)
            if form and form not in forms:
                forms.append(form)
    if not forms:
        raise ValueError(
            f"response_template: the tokenizer never ends a token where {text!r} ends; expected "
            "another text"
        )
    # a form that ends with another one is found wherever that one is
    shortest = [f for f in forms if not any(g != f and f[-len(g) :] == g for g in forms)]
    return sorted(shortest, key=len)


def _form(text: str, before: str, after: str, tokenizer: Any) -> list[int] | None:
    """The tokens of ``text`` between two others; None where a token joins its end with ``after``.

    A token that joins its start with ``before`` belongs to the form where it adds white space, is
    left out where white space is all that it takes from the text, and else makes the form an empty
    one, since words do not meet so.
    """
    whole = before + text + after
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    start, end = len(before), len(before) + len(text)
    form, covered = [], start
    for token, (low, high) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if high <= start or low >= end:
            continue
        if high > end:
            return None
        covered = high
        if low >= start or not whole[low:start].strip():
            form.append(token)
        elif whole[start:high].strip():
            return []
    return form if covered == end else None


def _common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    prefix = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return prefix


def _common_suffix(rows: Sequence[Sequence[int]]) -> list[int]:
    return _common_prefix([list(reversed(row)) for row in rows])[::-1]


def from_chat_template(tokenizer: Any, **kwargs: Any) -> list[int]:
    """The token ids that a chat template puts between the end of a user's message and an answer.

    For ChatML these are the ids of ``<|im_end|>\\n<|im_start|>assistant\\n``; for Llama 2 those of
    ``[/INST]``. Found by
    rendering conversations with different questions and answers: what all of them have in common
    right before the answer, both in a complete conversation (training) and with
    ``add_generation_prompt=True``.

    Args:
        tokenizer: a tokenizer with a chat template. kwargs: passed to ``apply_chat_template``, such
            as ``enable_thinking``.

    Raises:
        ValueError: no chat template, or one in which nothing marks where an answer starts.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__} without a chat template, expected one "
            "with a template; "
            "or pass response_template=(text, tokenizer)"
        )

    def render(messages: list[dict[str, str]], **more: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **more, **kwargs)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    complete, asked = [], []
    for question in _QUESTIONS:
        user = {"role": "user", "content": question}
        answers = [render([user, {"role": "assistant", "content": answer}]) for answer in _ANSWERS]
        complete.append(_common_prefix(answers))
        asked.append(render([user], add_generation_prompt=True))
    trained, generated = _common_suffix(complete), _common_suffix(asked)
    template = _common_prefix([trained, generated])
    if not template:
        raise ValueError(
            "tokenizer: its chat template puts nothing in common before an answer in training "
            f"({tokenizer.decode(trained)!r}) and in generation ({tokenizer.decode(generated)!r}); "
            "pass response_template=[token ids] or (text, tokenizer)"
        )
    return template
