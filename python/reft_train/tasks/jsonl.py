"""A user's own rows: instruction and output, prompt and completion, or messages of a chat;
scored by exact match.
"""

from __future__ import annotations

from typing import Any

from reft_train.errors import UserError
from reft_train.tasks import fields
from reft_train.tasks.base import Decoding, Example, Row, Scored, Task
from reft_train.tasks.templates import alpaca

ROLES = ("system", "user", "assistant")
LAYOUTS = (("messages",), ("prompt", "completion"), ("instruction", "input", "output"))


class Jsonl(Task):
    """Rows in any of three layouts, which the fields tell apart.

    ``messages``: the prompt is the tokenizer's chat template of all but the last message, the
    target that message, which is the assistant's; in training every message of the assistant
    becomes such a
    row. ``prompt`` and ``completion``: as they are. ``instruction``, perhaps ``input``, and
    ``output``: Alpaca's prompt.
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
            raise UserError(
                f"{row.where}: got fields {', '.join(map(str, row.fields)) or 'none'}, "
                "expected messages, or prompt and completion, or instruction and output"
            )
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
        """See :meth:`Task.training_rows`; an assistant's message that comes first has no prompt
        and is left out.
        """
        if "messages" not in row.fields:
            return [row]
        from reft_kernels.integrations.turns import expand_turns

        messages = _conversation(row)
        turns = [
            turn for turn in expand_turns({"messages": [messages]})["messages"] if len(turn) > 1
        ]
        if not turns:
            raise UserError(
                f"{row.where}: messages: got none of role 'assistant' after another, expected one"
            )
        if len(turns) == 1:
            return [Row({**row.fields, "messages": turns[0]}, row.where)]
        return [
            Row({**row.fields, "messages": turn}, f"{row.where}, turn {number}")
            for number, turn in enumerate(turns, start=1)
        ]

    def score(self, generated: str, example: Example) -> Scored:
        """The whole text, stripped, must be the target exactly."""
        prediction = generated.strip()
        return Scored(prediction or None, prediction == example.answer)


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    messages = _messages(row)
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{row.where}: messages: got a tokenizer without a chat template, expected one that "
            "has it, "
            "or rows of prompt and completion"
        )
    import jinja2  # the template engine behind apply_chat_template

    try:
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{row.where}: messages: got a chat that the tokenizer's template refuses ({reason}), "
            f"expected roles in an order that it takes"
        ) from None
    return _without_second_start(prompt, tokenizer), messages[-1]["content"]


def _messages(row: Row) -> list[dict[str, str]]:
    messages = _conversation(row)
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"{row.where}: message {len(messages)}: got role {messages[-1]['role']!r} last, "
            "expected 'assistant'"
        )
    return messages


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


def _without_second_start(prompt: str, tokenizer: Any) -> str:
    # some templates write the token that the tokenizer adds again when it reads the prompt
    start = tokenizer.bos_token
    if start and prompt.startswith(start):
        ids = tokenizer(prompt)["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            return prompt[len(start) :]
    return prompt


def tasks() -> list[Task]:
    """The one task."""
    return [Jsonl()]
