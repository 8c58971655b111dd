"""Instruction following with Alpaca's prompts.

Answers are exported in ``alpaca_eval``'s format for a judge; they are not scored here.
"""

from __future__ import annotations

from collections.abc import Sequence

from reft_train.tasks import answers, fields
from reft_train.tasks.base import Decoding, Example, Row, Task
from reft_train.tasks.templates import alpaca

EVALUATION_SET = "alpaca_eval"


class Instruct(Task):
    """Rows with ``instruction``, optional ``input``, and ``output``."""

    name = "instruct"
    recipe = "instruct"
    # 2,048 tokens of prompt and answer together are the effective limit
    decoding = Decoding(max_new_tokens=2048, max_total_tokens=2048)
    test_sets = (EVALUATION_SET,)
    metrics = ()

    def example(self, row: Row, tokenizer: object = None) -> Example:
        output = fields.string(row, "output")
        prompt = alpaca(fields.filled(row, "instruction"), fields.optional(row, "input"))
        return Example(prompt, output, output, row.fields)


def alpaca_eval_rows(
    examples: Sequence[Example], outputs: Sequence[str], generator: str
) -> list[dict[str, str]]:
    """Return the rows that ``alpaca_eval --model_outputs`` reads.

    Args:
        examples: examples of :class:`Instruct`.
        outputs: generated texts, one for each example.
        generator: the model's name in the tables.

    Returns:
        Rows of instruction, output, dataset ("alpaca_eval" unless given in the row) and generator.

    Raises:
        ValueError: the numbers of outputs and examples differ.
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
    return [Instruct()]
