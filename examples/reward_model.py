"""A reward model with TRL: a scalar head on a chat model, trained on pairs of answers.

    python examples/reward_model.py [MODEL]

The score head reads the last token of the answer, so every token may be edited: ``all``.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="runs/examples/reward")
args = parser.parse_args()


def said(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


QUESTIONS = ("What is a cat?", "What is snow?", "What is a song?", "What is tea?")
rows = [
    {"chosen": said(question, "Let me explain."), "rejected": said(question, "Go away.")}
    for question in QUESTIONS
]
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(
    args.model, num_labels=1, dtype="float32"
)
model.config.pad_token_id = tokenizer.pad_token_id
reft = ReftConfig(
    task_type="SEQ_CLS", layers="all", rank=4, positions="all", modules_to_save=["score"]
)
settings = RewardConfig(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    logging_steps=2,
    logging_first_step=True,
    save_strategy="no",
    report_to="none",
    gradient_checkpointing=False,
    bf16=False,
)
trainer = RewardTrainer(
    model,
    args=settings,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=reft,
)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"loss {entry['loss']:.3f}, accuracy {entry['accuracy']:.2f}")
trainer.save_model(args.out)

# prints, with SmolLM2-135M-Instruct:
# loss 0.927, accuracy 0.00
# loss 0.406, accuracy 1.00
# loss 0.038, accuracy 1.00
