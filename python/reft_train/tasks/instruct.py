"""Instruction following, and Alpaca's prompts, which other tasks share.

Adapters are trained on these exact texts, so changing one degrades existing adapters. Answers are
written for a judge, such as ``alpaca_eval``; they are not scored here.
"""

from __future__ import annotations

from reft_train.tasks import fields
from reft_train.tasks.base import Decoding, Example, Row, Scored, Task

RESPONSE = "### Response:"
# Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, train.py)
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca(instruction: str, input: str = "") -> str:
    """Format the Alpaca prompt; an empty ``input`` selects the variant without one."""
    if input:
        return ALPACA.format(instruction=instruction, input=input)
    return ALPACA_NO_INPUT.format(instruction=instruction)


def response(text: str) -> str:
    """Return the text after the first "### Response:", or the whole text if it does not occur."""
    before, mark, after = text.partition(RESPONSE)
    return after if mark else before


class Instruct(Task):
    """Rows with ``instruction``, optional ``input``, and ``output``."""

    name = "instruct"
    recipe = "instruct"
    # 2,048 tokens of prompt and answer together are the effective limit
    decoding = Decoding(max_new_tokens=2048, max_total_tokens=2048)
    test_sets = ("alpaca_eval",)
    metrics = ()

    def example(self, row: Row, tokenizer: object = None) -> Example:
        output = fields.string(row, "output")
        prompt = alpaca(fields.filled(row, "instruction"), fields.optional(row, "input"))
        return Example(prompt, output, output, row.fields)

    def score(self, generated: str, example: Example) -> Scored:
        """Return the stripped text after "### Response:", or the whole text without that marker."""
        return Scored(response(generated).strip(), None)
