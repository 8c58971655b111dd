"""Instruction following: Alpaca's prompts; the answers go to a judge in ``alpaca_eval``'s format
and are not scored here.
"""

from __future__ import annotations

from collections.abc import Sequence

from reft_train.tasks import answers, fields
from reft_train.tasks.base import Decoding, Example, Row, Task
from reft_train.tasks.templates import alpaca

EVALUATION_SET = "alpaca_eval"


class Instruct(Task):
    """Rows of ``instruction``, perhaps ``input``, and ``output``."""

    name = "instruct"
    recipe = "instruct"
    # the limit of the whole text rules: prompt and answer together have 2,048 tokens
    decoding = Decoding(max_new_tokens=2048, max_total_tokens=2048)
    test_sets = (EVALUATION_SET,)
    metrics = ()

    def example(self, row: Row, tokenizer: object = None) -> Example:
        """See :meth:`Task.example`."""
        output = fields.string(row, "output")
        prompt = alpaca(fields.filled(row, "instruction"), fields.optional(row, "input"))
        return Example(prompt, output, output, row.fields)


def alpaca_eval_rows(
    examples: Sequence[Example], outputs: Sequence[str], generator: str
) -> list[dict[str, str]]:
    """The rows that ``alpaca_eval --model_outputs`` reads.

    Args:
        examples: of :class:`Instruct`. outputs: generated texts, one for each. generator: the
            model's name in the tables.

    Returns:
        Rows of instruction, output, dataset (the row's own, else "alpaca_eval") and generator.

    Raises:
        ValueError: not one output for each example.
    """
    return [
        {
            "instruction": example.row["instruction"],
            "output": answers.response(output).strip(),
            "dataset": example.row.get("dataset") or EVALUATION_SET,
            "generator": generator,
        }
        for example, output in zip(examples, outputs, strict=True)
    ]


def tasks() -> list[Task]:
    """The one task."""
    return [Instruct()]
