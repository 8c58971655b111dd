"""Arithmetic reasoning: seven sets in LLM-Adapters' format and a mixture for training.

The prompt is Alpaca's and the target is the worked solution in ``output``. Only the final answer is
scored.
"""

from __future__ import annotations

import re

from reft_train.tasks import answers, fields
from reft_train.tasks.base import Decoding, Example, Row, Scored, Task
from reft_train.tasks.templates import alpaca

SETS = ("MultiArith", "gsm8k", "SVAMP", "mawps", "AddSub", "AQuA", "SingleEq")


class Arithmetic(Task):
    """One of the seven arithmetic sets, or their mixture."""

    def __init__(self, name: str, test_sets: tuple[str, ...]) -> None:
        self.name, self.test_sets = name, test_sets
        self.recipe = "gsm8k" if name == "gsm8k" else "math"
        self.decoding = Decoding(256 if name == "gsm8k" else 512)

    def example(self, row: Row, tokenizer: object = None) -> Example:
        """See :meth:`Task.example`.

        ``input`` may be empty, and ``output`` too in rows that are only scored.
        """
        prompt = alpaca(fields.filled(row, "instruction"), fields.optional(row, "input"))
        return Example(prompt, fields.string(row, "output").strip(), fields.answer(row), row.fields)

    def score(self, generated: str, example: Example) -> Scored:
        """Compare the text after "### Response:", or the whole text without that marker.

        The answer determines the comparison: a number is compared with the last number, within
        1e-3; a letter A to E with the first of these letters; anything else with the whole stripped
        response.
        """
        text = answers.response(generated)
        number = answers.number(example.answer)
        if number is not None:
            prediction = answers.last_number(text)
            return Scored(prediction, answers.same_number(prediction, number))
        letter = re.fullmatch("[A-E]", example.answer)
        prediction = answers.first_letter(text) if letter else text.strip() or None
        return Scored(prediction, prediction == example.answer)


def tasks() -> list[Task]:
    return [Arithmetic("math", SETS), *(Arithmetic(name, (name,)) for name in SETS)]
