"""Token ids of the text that precedes a response (the response template).

They are determined from a tokenizer's chat template or from a given text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_kernels.checks import describe

# Texts before and after a template. Tokenizers may merge characters across its borders.
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
    """Return a response template as a list of alternatives, each a list of token ids.

    Args:
        value: Token ids, a list of alternatives, or ``(text, tokenizer)``.

    Raises:
        ValueError: If ``value`` has another form or is empty.
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
    """Return the token ids that a text can have within other text.

    The tokens at its borders depend on the surrounding text, so there may be several alternatives.

    Args:
        text: The text that precedes a response.
        tokenizer: A fast tokenizer of transformers.

    Raises:
        ValueError: If the text is empty or ends with a space, if the tokenizer gives no character
            offsets, or if no token ends where the text ends.
    """
    if not text:
        raise ValueError(
            "response_template: got an empty text, expected what stands right before a response"
        )
    if text[-1] in " \t":  # tokenizers merge it with the first word of the response
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
    # Wherever a form occurs, each of its suffixes occurs too
    shortest = [f for f in forms if not any(g != f and f[-len(g) :] == g for g in forms)]
    return sorted(shortest, key=len)


def _form(text: str, before: str, after: str, tokenizer: Any) -> list[int] | None:
    """Return the tokens of ``text`` between ``before`` and ``after``.

    A token may span the border of ``before`` and ``text``. It is included if it covers only white
    space of ``before``, and omitted if it covers only white space of ``text``; otherwise the result
    is empty.

    Returns:
        Token ids, or None if no token ends where ``text`` ends.
    """
    whole = before + text + after
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    start, end = len(before), len(before) + len(text)
    form: list[int] = []
    covered = start
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
    prefix: list[int] = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return prefix


def _common_suffix(rows: Sequence[Sequence[int]]) -> list[int]:
    return _common_prefix([list(reversed(row)) for row in rows])[::-1]


def from_chat_template(tokenizer: Any, **kwargs: Any) -> list[int]:
    """Return the token ids that a chat template puts between a user's message and the answer.

    For ChatML these are the ids of ``<|im_end|>\\n<|im_start|>assistant\\n``, for Llama 2 those of
    ``[/INST]``. They are determined by rendering conversations with different questions and
    answers: the result is what precedes the answer in all of them, both in complete conversations
    (training) and with ``add_generation_prompt=True``.

    Args:
        tokenizer: A tokenizer with a chat template.
        **kwargs: Passed to ``apply_chat_template``, such as ``enable_thinking``.

    Raises:
        ValueError: If there is no chat template, or if it does not mark where an answer starts.
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
