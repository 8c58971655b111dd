"""What a generated text answers, under the rules that published numbers were scored with: pure
functions of the text.
"""

from __future__ import annotations

import math
import re

TRIGGER = "the correct answer is "
RESPONSE = "### Response:"
# two numbers nearer than this are the same answer
TOLERANCE = 1e-3


def after_trigger(text: str) -> str | None:
    """What follows the first "the correct answer is ", stripped; None where it does not occur or
    nothing follows.
    """
    return text.partition(TRIGGER)[2].strip() or None


def response(text: str) -> str:
    """What follows the first "### Response:"; the whole text where it does not occur."""
    before, mark, after = text.partition(RESPONSE)
    return after if mark else before


def last_number(text: str) -> str | None:
    """The last run of digits, after dropping commas, with its minus sign and its decimals; None
    where there is none.

    A percent or a dollar sign is left out, "3." is 3 and "1/2" ends in 2. A hyphen before a digit
    is a minus sign, so "10-7" ends in -7: rules as simple as these scored the published numbers,
    and better ones would not compare.
    """
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return found[-1] if found else None


def first_letter(text: str) -> str | None:
    """The first capital letter A to E, wherever it stands: "The Answer is (B)" gives A; None
    where there is none.
    """
    found = re.search("[A-E]", text)
    return found[0] if found else None


def number(answer: str) -> float | None:
    """The number that an answer is, as "1,234.5", "$3" or "12%"; None for anything else."""
    text = answer.strip().replace(",", "").removeprefix("$").removesuffix("%").strip()
    return float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) else None


def same_number(prediction: str | None, answer: float) -> bool:
    """Whether a number in text is within 1e-3 of the answer; None never is."""
    return prediction is not None and math.fabs(float(prediction) - answer) <= TOLERANCE
