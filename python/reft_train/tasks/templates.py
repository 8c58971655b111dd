"""Prompt templates.

Adapters are trained on these exact texts, so changing one degrades existing adapters.
"""

from __future__ import annotations

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
