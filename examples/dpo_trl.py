"""Preference optimization (DPO) of a chat model with TRL.

    python examples/dpo_trl.py [MODEL]

TRL's trainer passes no labels, so the adapter's ``response_template`` says where prompts end. The
reference model is the same model with the adapter disabled; no second copy is needed.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from reft_kernels.integrations.peft import ReftConfig, from_chat_template

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="runs/examples/dpo")
args = parser.parse_args()

QUESTIONS = ("Is it raining?", "May I come in?", "Is this right?", "Do you like tea?")


def said(role, text):
    return [{"role": role, "content": text}]


rows = [
    {
        "prompt": said("user", question),
        "chosen": said("assistant", "Yes."),
        "rejected": said("assistant", "I am only a language model and cannot say."),
    }
    for question in QUESTIONS
]
tokenizer = AutoTokenizer.from_pretrained(args.model)
reft = ReftConfig(
    task_type="CAUSAL_LM",
    layers="all",
    rank=4,
    positions="l3",
    response_template=from_chat_template(tokenizer),
)
settings = DPOConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    beta=0.1,
    logging_steps=4,
    logging_first_step=True,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,
    bf16=False,
)
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=reft,
)
trainer.train()
for entry in trainer.state.log_history:
    if "rewards/margins" in entry and "loss" in entry:
        print(f"loss {entry['loss']:.3f}, margin {entry['rewards/margins']:.2f}")
trainer.save_model(args.out)

# prints, with SmolLM2-135M-Instruct:
# loss 0.693, margin 0.00
# loss 0.114, margin 2.99
# loss 0.001, margin 7.48
