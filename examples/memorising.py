"""One edit of one token that stores a text: pyreft's notebook on memorising, carried over.

    python examples/memorising.py [MODEL]

LoReFT of rank 1 at the last token of the prompt, in one layer, is trained until the model writes
the text word for word; nothing else of the model changes.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_kernels.integrations.peft import ReftConfig

TEXT = (
    "Welcome to the natural language processing group! We are a lively team with good taste in "
    "coffee, and our door is open."
)
parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--layer", type=int, default=10)
parser.add_argument("--rank", type=int, default=1)
parser.add_argument("--steps", type=int, default=150)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers=[args.layer], rank=args.rank, positions="l1")
model = get_peft_model(base, reft).train()
model.print_trainable_parameters()

prompt = tokenizer("RANDOM->", return_tensors="pt").input_ids
answer = tokenizer(TEXT, return_tensors="pt").input_ids
end = torch.tensor([[tokenizer.eos_token_id]])
text = torch.cat([prompt, answer, end], 1)
labels = text.clone()
labels[:, : prompt.shape[1]] = -100
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
for step in range(args.steps):
    loss = model(input_ids=text, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 25 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

options = {"max_new_tokens": answer.shape[1] + 1, "do_sample": False}
written = model.eval().generate(input_ids=prompt, **options)[0, prompt.shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))
same = int((written[: answer.shape[1]] == answer[0, : len(written)]).sum())
print(f"{same} of {answer.shape[1]} tokens are the text's")

# prints, with SmolLM2-135M-Instruct:
# step 0: loss 4.337
# step 149: loss 0.007
# Welcome to the natural language processing group! We are a lively team with ...
# 25 of 25 tokens are the text's
