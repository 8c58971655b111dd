"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' format, and a mixture.

The prompt is the instruction and a newline, the target "the correct answer is {answer}". Single
sets also have class numbers, for training encoders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reft_train.errors import UserError
from reft_train.tasks import answers, fields
from reft_train.tasks.base import Classified, Decoding, Example, Row, Scored, Task
from reft_train.tasks.measures import measure

SETS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    # a few ARC questions have three or five choices
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
_FORMAT_TAIL = re.compile(r"\s*Answer format: \w+(?:/\w+)*\s*\Z")
_BOOLQ_HEAD = "Please answer the following question with true or false, question: "


class Commonsense(Task):
    """One of the eight sets, or their mixture.

    ``labels`` of the mixture is None, since the sets' labels differ.
    """

    recipe = "commonsense"
    decoding = Decoding(max_new_tokens=32)

    def __init__(self, name: str, labels: Sequence[str] | None, test_sets: Sequence[str]) -> None:
        self.name, self.labels, self.test_sets = name, labels, test_sets

    def example(self, row: Row, tokenizer: object = None) -> Example:
        """See :meth:`Task.example`. A non-empty ``input`` follows on a separate line."""
        parts = [fields.filled(row, "instruction"), fields.optional(row, "input")]
        answer = fields.answer(row)
        return Example(
            "\n".join(filter(None, parts)) + "\n", answers.TRIGGER + answer, answer, row.fields
        )

    def classified(self, row: Row) -> Classified:
        """Return the instruction without its last line ("Answer format: ..."), and any ``input``.

        For boolq only the question is kept, since the text before it is the same in every row.
        """
        if self.labels is None:
            return super().classified(row)
        instruction = fields.filled(row, "instruction")
        answer = fields.answer(row)
        if answer not in self.labels:
            raise UserError(
                f"{row.where}: answer: got {answer!r}, expected one of {', '.join(self.labels)}"
            )
        text = _FORMAT_TAIL.sub("", instruction).removeprefix(_BOOLQ_HEAD) or instruction
        return Classified(
            text, fields.optional(row, "input") or None, self.labels.index(answer), row.fields
        )

    def score(self, generated: str, example: Example) -> Scored:
        """The stripped text after "the correct answer is " must equal the answer."""
        prediction = answers.after_trigger(generated)
        return Scored(prediction, prediction == example.answer)

    def measure(
        self, predictions: Sequence[int | float], references: Sequence[int | float]
    ) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": measure("accuracy", predictions, references)}


def tasks() -> list[Task]:
    """Return the mixture and the sets."""
    return [
        Commonsense("commonsense", None, tuple(SETS)),
        *(Commonsense(name, labels, (name,)) for name, labels in SETS.items()),
    ]
