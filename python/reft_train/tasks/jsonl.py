"""Custom data: instruction and output, prompt and completion, or chat messages."""

from __future__ import annotations

from typing import Any

from reft_train.errors import UserError
from reft_train.tasks import fields
from reft_train.tasks.base import Decoding, Example, Row, Scored, Task
from reft_train.tasks.templates import alpaca

ROLES = ("system", "user", "assistant")
LAYOUTS = (("messages",), ("prompt", "completion"), ("instruction", "input", "output"))


class Jsonl(Task):
    """Rows in one of three formats, detected from their fields; scored by exact match.

    ``messages``: the prompt is all but the last message in the tokenizer's chat template, and the
    target is the last message, from the assistant. In training every assistant message becomes a
    separate row. ``prompt`` and ``completion``: used unchanged. ``instruction``, optional
    ``input``, and ``output``: formatted with Alpaca's prompt.
    """

    name = "jsonl"
    recipe = "default"
    decoding = Decoding(max_new_tokens=256)
    test_sets = ("test",)
    metrics = ("exact_match",)

    def example(self, row: Row, tokenizer: Any = None) -> Example:
        """See :meth:`Task.example`."""
        layout = next(
            (names for names in LAYOUTS if any(name in row.fields for name in names)), None
        )
        if layout is None:
            names = ", ".join(map(str, row.fields)) or "none"
            expected = "messages, or prompt and completion, or instruction and output"
            raise UserError(f"{row.where}: got fields {names}, expected {expected}")
        if layout[0] == "messages":
            prompt, target = _chat(row, tokenizer)
        elif layout[0] == "prompt":
            prompt, target = (
                fields.filled(row, "prompt", layout),
                fields.string(row, "completion", layout),
            )
        else:
            target = fields.string(row, "output", layout)
            prompt = alpaca(
                fields.filled(row, "instruction", layout), fields.optional(row, "input", layout)
            )
        return Example(prompt, target, target.strip(), row.fields)

    def training_rows(self, row: Row) -> list[Row]:
        """Split a conversation by assistant messages; see :meth:`Task.training_rows`.

        A leading assistant message has no prompt and is skipped.
        """
        if "messages" not in row.fields:
            return [row]
        from reft_kernels.integrations.turns import expand_turns

        expanded = expand_turns({"messages": [_conversation(row)]})["messages"]
        turns = [turn for turn in expanded if len(turn) > 1]
        if not turns:
            raise UserError(
                f"{row.where}: messages: got none of role 'assistant' after another, expected one"
            )
        where = [f"{row.where}, turn {number}" for number in range(1, len(turns) + 1)]
        where = [row.where] if len(turns) == 1 else where
        return [
            Row({**row.fields, "messages": turn}, place)
            for turn, place in zip(turns, where, strict=True)
        ]

    def score(self, generated: str, example: Example) -> Scored:
        """The whole stripped text must equal the target."""
        prediction = generated.strip()
        return Scored(prediction or None, prediction == example.answer)


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    messages = _conversation(row)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise UserError(
            f"{row.where}: message {len(messages)}: got role {role!r} last, expected 'assistant'"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        expected = "one that has it, or rows of prompt and completion"
        raise UserError(
            f"{row.where}: messages: got a tokenizer without a chat template, expected {expected}"
        )
    import jinja2  # template engine used by apply_chat_template

    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        reason = f"a chat that the tokenizer's template refuses ({' '.join(str(error).split())})"
        raise UserError(
            f"{row.where}: messages: got {reason}, expected roles in an order that it takes"
        ) from None
    start = tokenizer.bos_token
    # some templates write the BOS token that the tokenizer adds again when it encodes the prompt
    if (
        start
        and prompt.startswith(start)
        and tokenizer(prompt)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    ):
        prompt = prompt[len(start) :]
    return prompt, messages[-1]["content"]


def _conversation(row: Row) -> list[dict[str, str]]:
    messages = row.fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(
            f"{row.where}: messages: got {fields.described(messages)}, expected a list of at "
            "least two"
        )
    for number, message in enumerate(messages, start=1):
        where = f"{row.where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(
                f"{where}: got {fields.described(message)}, expected an object with role and "
                "content"
            )
        part = Row(message, where)
        role = fields.filled(part, "role", ("role", "content"))
        if role not in ROLES:
            raise UserError(f"{where}: role: got {role!r}, expected one of {', '.join(ROLES)}")
        fields.filled(part, "content", ("role", "content"))
    return messages


def tasks() -> list[Task]:
    """Return the task."""
    return [Jsonl()]
