"""The benchmarks of LLM-Adapters: commonsense and arithmetic reasoning, their sets and mixtures.

Commonsense: the prompt is the instruction and a newline, the target "the correct answer is
{answer}". Single sets also have class numbers, for training encoders.

Arithmetic: the prompt is Alpaca's and the target is the worked solution in ``output``. Only the
final answer is scored.

Answers are extracted from generated text by the rules used for published scores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from reft_train.errors import wrong
from reft_train.tasks import fields
from reft_train.tasks.base import Classified, Decoding, Example, Row, Scored, Task
from reft_train.tasks.instruct import alpaca, response

TRIGGER = "the correct answer is "
# tolerance for equal numbers
TOLERANCE = 1e-3
ARITHMETIC = ("MultiArith", "gsm8k", "SVAMP", "mawps", "AddSub", "AQuA", "SingleEq")
# the labels are a word with these numbers; a few ARC questions have three or five choices
_CHOICES = {"piqa": ("solution", 2), "social_i_qa": ("answer", 3), "hellaswag": ("ending", 4)}
_CHOICES |= {"winogrande": ("option", 2), "ARC-Easy": ("answer", 5)}
_CHOICES |= {"ARC-Challenge": ("answer", 5), "openbookqa": ("answer", 4)}
COMMONSENSE: dict[str, tuple[str, ...]] = {"boolq": ("true", "false")}
COMMONSENSE |= {n: tuple(f"{word}{i + 1}" for i in range(k)) for n, (word, k) in _CHOICES.items()}
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
        return Example(prompt, TRIGGER + answer, answer, row.fields)

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
        prediction = after_trigger(generated)
        return Scored(prediction, prediction == example.answer)


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
        text = response(generated)
        expected = number(example.answer)
        if expected is not None:
            prediction = last_number(text)
            return Scored(prediction, same_number(prediction, expected))
        letter = re.fullmatch("[A-E]", example.answer)
        prediction = first_letter(text) if letter else text.strip() or None
        return Scored(prediction, prediction == example.answer)


def after_trigger(text: str) -> str | None:
    """Return the stripped text after the first "the correct answer is ".

    None if the phrase does not occur or nothing follows it.
    """
    return text.partition(TRIGGER)[2].strip() or None


def last_number(text: str) -> str | None:
    """Return the last number in a text with sign and decimals, after dropping commas, or None.

    Percent and dollar signs are ignored, "3." gives 3 and "1/2" gives 2. A hyphen before a digit is
    a minus sign, so "10-7" gives -7. Published numbers were scored with these simple rules;
    stricter ones would not be comparable.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return numbers[-1] if numbers else None


def first_letter(text: str) -> str | None:
    """Return the first capital letter A to E, or None.

    It may occur anywhere: "The Answer is (B)" gives A.
    """
    match = re.search("[A-E]", text)
    return match[0] if match else None


def number(answer: str) -> float | None:
    """Parse an answer such as "1,234.5", "$3" or "12%" as a number; None for anything else."""
    text = answer.strip().replace(",", "").removeprefix("$").removesuffix("%").strip()
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) else None


def same_number(prediction: str | None, answer: float) -> bool:
    """Whether a number in text is within 1e-3 of the answer; False for None."""
    return prediction is not None and math.fabs(float(prediction) - answer) <= TOLERANCE
