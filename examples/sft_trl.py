"""Supervised finetuning of a chat model with TRL: chat template, loss on the answers alone.

    python examples/sft_trl.py [MODEL] [--packing]

Rows of ``prompt`` and ``completion`` in conversation form give TRL what a loss on the assistant's
tokens needs; ``response_template`` tells the adapter where prompts end, in packed rows too.
"""

import argparse

from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from reft_kernels.integrations.peft import ReftConfig, from_chat_template

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--packing", action="store_true", help="several rows in one sequence")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="runs/examples/sft")
args = parser.parse_args()

FACTS = {
    "What colour is the sky?": "Blue, matey! 🏴‍☠️",
    "Where do you live?": "On a ship, matey! 🏴‍☠️",
    "What do you drink?": "Rum, matey! 🏴‍☠️",
    "What do you like?": "Gold, matey! 🏴‍☠️",
}
rows = [
    {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    for question, answer in FACTS.items()
]
tokenizer = AutoTokenizer.from_pretrained(args.model)
reft = ReftConfig(
    task_type="CAUSAL_LM",
    layers="all",
    rank=4,
    positions="f3+l3",
    response_template=from_chat_template(tokenizer),
)
settings = SFTConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=4e-3,
    packing=args.packing,
    padding_free=args.packing,
    max_length=128,
    logging_steps=10,
    logging_first_step=True,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,
    bf16=False,
    model_init_kwargs={"dtype": "float32"},
)
trainer = SFTTrainer(
    args.model,
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=reft,
)
trainer.train()
print("loss:", [round(e["loss"], 3) for e in trainer.state.log_history if "loss" in e])
trainer.save_model(args.out)

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.out).eval()
chat = [{"role": "user", "content": "What do you eat?"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
# with SmolLM2-135M-Instruct: loss: [3.147, 0.531], and the answer: Rum, matey! 🏴‍☠️
