"""A training loop with accelerate: mixed precision, accumulation, several processes.

    python examples/accelerate_loop.py [MODEL]
    accelerate launch examples/accelerate_loop.py [MODEL]

R is built once for the two forwards of an optimizer step: they run in ``shared_build``.
"""

import argparse

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--out", default="runs/examples/accelerate")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
animals = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack"}
rows = [(f"The {animal} says", f" {sound}") for animal, sound in animals.items()]


def collate(batch):
    """Tokenize, pad on the right, and mask prompts and padding in the labels."""
    inputs = tokenizer([p + a for p, a in batch], return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, (prompt, _) in enumerate(batch):
        labels[row, : len(tokenizer(prompt).input_ids)] = -100
    return {**inputs, "labels": labels}


base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(base, reft).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
loader = DataLoader(rows, batch_size=2, shuffle=False, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for _ in range(args.epochs):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    losses.append(round(loss.item(), 3))
accelerator.print("loss:", losses)
accelerator.unwrap_model(model).save_pretrained(
    args.out, is_main_process=accelerator.is_main_process
)

# prints, with SmolLM2-135M-Instruct:
# loss: [5.146, 2.518, 1.005, 0.09, 0.01, 0.01, 0.011, 0.01, 0.009, 0.007]
