"""Extraction of answers from generated text, by the rules used for published scores.

All functions are pure functions of the text.
"""

from __future__ import annotations

import math
import re

TRIGGER = "the correct answer is "
RESPONSE = "### Response:"
# tolerance for equal numbers
TOLERANCE = 1e-3


def after_trigger(text: str) -> str | None:
    """Return the stripped text after the first "the correct answer is ".

    None if the phrase does not occur or nothing follows it.
    """
    return text.partition(TRIGGER)[2].strip() or None


def response(text: str) -> str:
    """Return the text after the first "### Response:", or the whole text if it does not occur."""
    before, mark, after = text.partition(RESPONSE)
    return after if mark else before


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
