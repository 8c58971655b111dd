"""Four ways to load a saved adapter, and training that goes on from it.

    python examples/load_adapter.py [MODEL] [--out FOLDER]

A new adapter is trained for a few steps and saved first, so that the program runs by itself.
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--out", default="runs/examples/adapter")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
prompt = "The sea is"
inputs = tokenizer(prompt, return_tensors="pt")


def train(model, steps):
    """Teach the model one sentence, and return the losses."""
    text = tokenizer(f"{prompt} made of lemonade", return_tensors="pt").input_ids
    labels = text.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=text, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 3))
    return losses


base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(base, reft).train()
print("first steps:", train(model, args.steps))
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

# 1: PEFT, on a model that is loaded already; is_trainable lets training go on
base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
model = PeftModel.from_pretrained(base, args.out, is_trainable=True).train()
print("further steps:", train(model, args.steps))

# 2: PEFT, which reads the base model's name from the adapter
auto = AutoPeftModelForCausalLM.from_pretrained(args.out).eval()
options = {"max_new_tokens": 5, "do_sample": False}
first = tokenizer.decode(auto.generate(**inputs, **options)[0], skip_special_tokens=True)

# 3: transformers, which also reads the base model's name
loaded = AutoModelForCausalLM.from_pretrained(args.out)
second = tokenizer.decode(loaded.generate(**inputs, **options)[0], skip_special_tokens=True)

# 4: a pipeline
generator = pipeline("text-generation", model=args.out, tokenizer=tokenizer)
third = generator(prompt, return_full_text=True, **options)[0]["generated_text"]
print([first, second, third])

# prints, with SmolLM2-135M-Instruct:
# first steps: [5.198, 2.285, 0.667, 0.018, 0.031]
# further steps: [0.021, 0.001, 0.0, 0.0, 0.001]
# ['The sea is made of lemonade, lemonade', ... the same text three times]
