"""Custom data: instruction and output, prompt and completion, or chat messages."""

from __future__ import annotations

from typing import Any

from reft_train.errors import one_line, wrong
from reft_train.tasks import fields
from reft_train.tasks.base import Decoding, Example, Row, Scored, Task
from reft_train.tasks.instruct import alpaca

ROLES = ("system", "user", "assistant")


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
        if "messages" in row.fields:
            prompt, target = _chat(row, tokenizer)
        elif "prompt" in row.fields or "completion" in row.fields:
            prompt, target = fields.filled(row, "prompt"), fields.string(row, "completion")
        elif "instruction" in row.fields or "output" in row.fields:
            prompt = alpaca(fields.filled(row, "instruction"), fields.optional(row, "input"))
            target = fields.string(row, "output")
        else:
            names = ", ".join(map(str, row.fields)) or "none"
            expected = "messages, or prompt and completion, or instruction and output"
            raise wrong(row.where, f"fields {names}", expected)
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
            raise wrong(f"{row.where}: messages", "no 'assistant' message after another", "one")
        numbers = [f", turn {number}" for number in range(1, len(turns) + 1)]
        wheres = [row.where + (number if len(turns) > 1 else "") for number in numbers]
        made = zip(turns, wheres, strict=True)
        return [Row({**row.fields, "messages": turn}, where) for turn, where in made]

    def score(self, generated: str, example: Example) -> Scored:
        """The whole stripped text must equal the target."""
        prediction = generated.strip()
        return Scored(prediction or None, prediction == example.answer)


def _chat(row: Row, tokenizer: Any) -> tuple[str, str]:
    messages, name = _conversation(row), f"{row.where}: messages"
    if messages[-1]["role"] != "assistant":
        raise wrong(name, f"role {messages[-1]['role']!r} last", "'assistant'")
    if getattr(tokenizer, "chat_template", None) is None:
        raise wrong(name, "a tokenizer without a chat template", "one, or prompt and completion")
    import jinja2  # template engine used by apply_chat_template

    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], **options)
    except jinja2.TemplateError as error:
        what = f"a chat that the tokenizer's template rejects ({one_line(error)})"
        raise wrong(name, what, "an order of roles that it accepts") from None
    return prompt, messages[-1]["content"]


def _conversation(row: Row) -> list[dict[str, str]]:
    messages = row.fields["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        expected = "a list of at least two"
        raise wrong(f"{row.where}: messages", fields.described(messages), expected)
    for number, message in enumerate(messages, start=1):
        where = f"{row.where}: message {number}"
        if not isinstance(message, dict):
            raise wrong(where, fields.described(message), "an object with role and content")
        part = Row(message, where)
        role = fields.filled(part, "role")
        if role not in ROLES:
            raise wrong(f"{where}: role", repr(role), f"one of {', '.join(ROLES)}")
        fields.filled(part, "content")
    return messages
