"""Instruction following with Alpaca's prompts.

Answers are exported in ``alpaca_eval``'s format for a judge; they are not scored here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def alpaca_eval_row(prediction: Mapping[str, Any], generator: str) -> dict[str, str]:
    """Return the row of a prediction that ``alpaca_eval --model_outputs`` reads.

    ``generator`` is the model's name in the tables; the dataset is "alpaca_eval" by default.
    """
    output, dataset = answers.response(prediction["generated"]), prediction.get("dataset")
    row = {"instruction": prediction["instruction"], "output": output.strip()}
    return {**row, "dataset": dataset or EVALUATION_SET, "generator": generator}


def tasks() -> list[Task]:
    return [Instruct()]
