"""Commonsense reasoning: eight multiple-choice sets in LLM-Adapters' format, and a mixture.

The prompt is the instruction and a newline, the target "the correct answer is {answer}". Single
sets also have class numbers, for training encoders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reft_train.errors import wrong
from reft_train.tasks import answers, fields
from reft_train.tasks.base import Classified, Decoding, Example, Row, Scored, Task

# the labels are a word with these numbers; a few ARC questions have three or five choices
_CHOICES = {"piqa": ("solution", 2), "social_i_qa": ("answer", 3), "hellaswag": ("ending", 4)}
_CHOICES |= {"winogrande": ("option", 2), "ARC-Easy": ("answer", 5)}
_CHOICES |= {"ARC-Challenge": ("answer", 5), "openbookqa": ("answer", 4)}
SETS: dict[str, tuple[str, ...]] = {"boolq": ("true", "false")}
SETS |= {n: tuple(f"{word}{i + 1}" for i in range(k)) for n, (word, k) in _CHOICES.items()}
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
        prompt, answer = "\n".join(filter(None, parts)) + "\n", fields.answer(row)
        return Example(prompt, answers.TRIGGER + answer, answer, row.fields)

    def classified(self, row: Row) -> Classified:
        """Return the instruction without its last line ("Answer format: ..."), and any ``input``.

        For boolq only the question is kept, since the text before it is the same in every row.
        """
        if self.labels is None:
            return super().classified(row)
        instruction, answer = fields.filled(row, "instruction"), fields.answer(row)
        if answer not in self.labels:
            raise wrong(f"{row.where}: answer", repr(answer), f"one of {', '.join(self.labels)}")
        text = _FORMAT_TAIL.sub("", instruction).removeprefix(_BOOLQ_HEAD) or instruction
        pair, label = fields.optional(row, "input") or None, self.labels.index(answer)
        return Classified(text, pair, label, row.fields)

    def score(self, generated: str, example: Example) -> Scored:
        """The stripped text after "the correct answer is " must equal the answer."""
        prediction = answers.after_trigger(generated)
        return Scored(prediction, prediction == example.answer)


def tasks() -> list[Task]:
    sets = [Commonsense(name, labels, (name,)) for name, labels in SETS.items()]
    return [Commonsense("commonsense", None, tuple(SETS)), *sets]
