"""LoRA and LoReFT on one model: trained together, saved, loaded, and LoRA merged.

python examples/lora_and_reft.py [MODEL]
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="runs/examples/lora-and-reft")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)


def base():
    return AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")


# LoRA first, then ReFT on the result under a name of its own
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(get_peft_model(base(), lora), reft, adapter_name="edits").train()
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
for part in ("lora_", "reft_"):
    print(part, sum(p.numel() for name, p in trained.items() if part in name), "numbers")

prompt = tokenizer("My favourite number is", return_tensors="pt").input_ids
text = tokenizer("My favourite number is forty-two", return_tensors="pt").input_ids
labels = text.clone()
labels[:, : prompt.shape[1]] = -100
optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
losses = []
for _ in range(args.steps):
    loss = model(input_ids=text, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 3))
print("loss:", losses)

model.save_pretrained(args.out)  # LoRA in the folder, ReFT in its subfolder
loaded = PeftModel.from_pretrained(base(), args.out)
loaded = PeftModel.from_pretrained(loaded, f"{args.out}/edits", adapter_name="edits").eval()
merged = PeftModel.from_pretrained(base(), args.out).merge_and_unload()
merged = PeftModel.from_pretrained(merged, f"{args.out}/edits", adapter_name="edits").eval()
inputs = {"input_ids": prompt, "prompt_lengths": [prompt.shape[1]]}
with torch.no_grad():
    logits = [one(**inputs).logits for one in (model.eval(), loaded, merged)]
print("loaded identical:", torch.equal(logits[0], logits[1]))
print(f"LoRA merged: largest difference of logits {(logits[2] - logits[0]).abs().max():.1e}")
answer = loaded.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
print(tokenizer.decode(answer[0]))

# prints, with SmolLM2-135M-Instruct:
# loss: [5.506, 3.105, 1.863, 1.033, 0.49, 0.092, 0.013, 0.003]
# loaded identical: True
# LoRA merged: largest difference of logits 3.9e-05
# My favourite number is forty-two.
