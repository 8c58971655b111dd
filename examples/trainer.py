"""Training with transformers' Trainer: tokenized rows, the prompt masked in the labels.

python examples/trainer.py [MODEL]
"""

import argparse
from itertools import pairwise

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="runs/examples/trainer")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight")
rows = [{"prompt": f"After {a} comes", "answer": f" {b}"} for a, b in pairwise(numbers)]


def tokenize(row):
    """Mask the prompt: the adapter edits what stands before the first label."""
    prompt = tokenizer(row["prompt"]).input_ids
    answer = tokenizer(row["answer"]).input_ids + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(model, reft)
model.print_trainable_parameters()

settings = TrainingArguments(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=7,
    learning_rate=4e-3,
    logging_steps=5,
    logging_first_step=True,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model,
    settings,
    train_dataset=Dataset.from_list(rows).map(tokenize, remove_columns=["prompt", "answer"]),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
print("loss:", [round(e["loss"], 3) for e in trainer.state.log_history if "loss" in e])

inputs = tokenizer("After three comes", return_tensors="pt").to(model.device)
answer = model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
model.save_pretrained(args.out)

# prints, with SmolLM2-135M-Instruct:
# loss: [10.484, 1.727, 0.005, 0.001, 0.0]
# After three comes four
