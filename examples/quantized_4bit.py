"""LoReFT on a base model in 4 bits (bitsandbytes), as QLoRA does it for LoRA.

    python examples/quantized_4bit.py [MODEL]

The edits work on hidden states, so the frozen weights may have any format. R, W and b stay float32.
"""

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", default="runs/examples/4bit")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)


def base():
    return AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )


reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(base(), reft).train()
print(f"base model: {model.get_base_model().get_memory_footprint() / 2**20:.0f} MiB")

prompt = tokenizer("The capital of Mars is", return_tensors="pt").input_ids
text = tokenizer("The capital of Mars is Redtown", return_tensors="pt").input_ids
labels = text.clone()
labels[:, : prompt.shape[1]] = -100
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
losses = []
for _ in range(args.steps):
    loss = model(input_ids=text, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 3))
print("loss:", losses)

model.save_pretrained(args.out)
loaded = PeftModel.from_pretrained(base(), args.out).eval()
options = {"max_new_tokens": 4, "do_sample": False}
inputs = {"input_ids": prompt, "prompt_lengths": [prompt.shape[1]]}
with torch.no_grad():  # bitsandbytes has other kernels where gradients are needed
    same = torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)
print(tokenizer.decode(loaded.generate(prompt, **options)[0]), "| loaded identical:", same)

# prints, with SmolLM2-135M-Instruct:
# base model: 159 MiB
# loss: [9.135, 2.748, 0.008, 0.001, 0.001, 0.002, 0.004, 0.005, 0.004, 0.004]
# The capital of Mars is Redtowntowntown | loaded identical: True
