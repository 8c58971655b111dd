"""An adapter folder as it goes to a hub: weights, configuration, model card; checked before upload.

    python examples/publish.py [MODEL] [--repo USER/NAME]

Without ``--repo`` nothing leaves the machine: the folder is what ``upload_folder`` would send.
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import ModelCard, upload_folder
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--repo", help="name on the hub")
parser.add_argument("--out", default="runs/examples/published")
args = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=4, positions="f2+l2")
model = get_peft_model(base, reft)
model.save_pretrained(args.out)
AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)

card = ModelCard.load(Path(args.out, "README.md"))
card.data.license = "apache-2.0"
card.save(Path(args.out, "README.md"))
with safe_open(Path(args.out, "adapter_model.safetensors"), "pt") as weights:
    numbers = sum(
        torch.Size(weights.get_slice(name).get_shape()).numel() for name in list(weights.keys())
    )
size = Path(args.out, "adapter_model.safetensors").stat().st_size
print(f"{numbers:,} numbers, {size:,} bytes:", *sorted(p.name for p in Path(args.out).iterdir()))
print("library:", card.data.library_name, "| tags:", card.data.tags)

again = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
loaded = PeftModel.from_pretrained(again, args.out).eval()
prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "prompt_lengths": [4]}
print("loads again:", torch.equal(loaded(**prompt).logits, model.eval()(**prompt).logits))
if args.repo:
    upload_folder(repo_id=args.repo, folder_path=args.out)

# prints, with SmolLM2-135M-Instruct:
# 138,480 numbers, 555,176 bytes: README.md adapter_config.json adapter_model.safetensors ...
# loads again: True
