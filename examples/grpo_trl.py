"""Reinforcement learning (GRPO) of a chat model with TRL and a reward function.

    python examples/grpo_trl.py [MODEL]

The reward is the share of capital letters in an answer. Answers are sampled with the adapter, and
scored with and without it, each time with edits at the prompt alone: ``response_template``.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from reft_kernels.integrations.peft import ReftConfig, from_chat_template

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--out", default="runs/examples/grpo")
args = parser.parse_args()


def capitals(completions, **_):
    """Return a reward for each answer: the share of its letters that are capitals."""
    texts = [completion[0]["content"] for completion in completions]
    letters = [[letter for letter in text if letter.isalpha()] for text in texts]
    return [sum(map(str.isupper, ones)) / max(len(ones), 1) for ones in letters]


QUESTIONS = ("Name a fruit.", "Name a city.", "Name a colour.", "Name an animal.")
rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
tokenizer = AutoTokenizer.from_pretrained(args.model)
reft = ReftConfig(
    task_type="CAUSAL_LM",
    layers="all",
    rank=4,
    positions="l3",
    response_template=from_chat_template(tokenizer),
)
settings = GRPOConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=12,
    learning_rate=4e-3,
    beta=0.0,
    logging_steps=3,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,
    bf16=False,
    seed=0,
)
trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
    reward_funcs=capitals,
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=reft,
)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print("mean reward:", [round(reward, 3) for reward in rewards])
trainer.save_model(args.out)

# prints, with SmolLM2-135M-Instruct:
# mean reward: [0.096, 0.199, 0.192, 0.13, 0.172], from one sampling of few answers
