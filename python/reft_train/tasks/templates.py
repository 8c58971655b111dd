"""Prompt templates, to the character: an adapter is trained on them, so a change of one makes
old adapters worse.
"""

from __future__ import annotations

# Stanford Alpaca's two prompts (github.com/tatsu-lab/stanford_alpaca, train.py); the response
# follows the colon
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
    """The Alpaca prompt; the one without an input where ``input`` is empty."""
    if input:
        return ALPACA.format(instruction=instruction, input=input)
    return ALPACA_NO_INPUT.format(instruction=instruction)
