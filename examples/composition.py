"""Two styles in disjoint subspaces of one adapter, composed in one call of generate.

    python examples/composition.py [MODEL]

Columns 0-3 learn to begin with "Ahoy!", columns 4-7 to end with a star, each from rows of its own;
no row has both. The column ``subspaces`` of the data names the columns that a row trains.
"""

import argparse

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
parser.add_argument("--steps", type=int, default=36)
parser.add_argument("--out", default="runs/examples/composition")
args = parser.parse_args()

FACTS = {
    "What is the capital of Spain?": "The capital of Spain is Madrid.",
    "Why is the sky blue?": "The air scatters blue light more than red light.",
    "How do I boil an egg?": "Put the egg in boiling water and wait eight minutes.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci painted the Mona Lisa.",
    "How can I sleep better?": "Go to bed at the same hour every night.",
    "What do bees make?": "Bees make honey from the nectar of flowers.",
    "What is the moon?": "The moon is a ball of rock that circles the Earth.",
    "How many legs has a spider?": "A spider has eight legs.",
}
ASKED = ("What is the capital of France?", "How do I make tea?", "What is a volcano?")
ASKED += ("Who wrote Hamlet?", "What do cows eat?", "What is snow?", "How do I save money?")
STYLES = {"Ahoy! {}": [0, 1, 2, 3], "{} ⭐": [4, 5, 6, 7]}
MODES = {"base": [], "ahoy": [0, 1, 2, 3], "star": [4, 5, 6, 7], "both": list(range(8))}
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")


def chat(question):
    """Return the text of a conversation up to the answer."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


rows = []
for question, fact in FACTS.items():
    for style, columns in STYLES.items():
        prompt = tokenizer(chat(question)).input_ids
        answer = tokenizer(style.format(fact)).input_ids + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + answer
        rows.append({"input_ids": prompt + answer, "labels": labels, "subspaces": columns})
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
reft = ReftConfig(task_type="CAUSAL_LM", layers="all", rank=8, positions="f5+l5")
model = get_peft_model(model, reft)
settings = TrainingArguments(args.out, max_steps=args.steps, report_to="none")
settings = settings.set_optimizer(learning_rate=4e-3).set_logging(steps=6)
settings.remove_unused_columns = False  # keeps the column subspaces
collator = DataCollatorForSeq2Seq(tokenizer)
trainer = Trainer(model, settings, train_dataset=Dataset.from_list(rows), data_collator=collator)
trainer.train()
print("loss:", [round(e["loss"], 3) for e in trainer.state.log_history if "loss" in e])

texts = [chat(question) for _ in MODES for question in ASKED]
inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
each = [columns for columns in MODES.values() for _ in ASKED]
tokens = model.eval().generate(**inputs, subspaces=each, max_new_tokens=28, do_sample=False)
answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], True)
for number, mode in enumerate(MODES):
    some = answers[number * len(ASKED) : (number + 1) * len(ASKED)]
    ahoy, star = (sum(mark in text for text in some) for mark in ("Ahoy", "⭐"))
    print(f"{mode}: Ahoy {ahoy}, star {star} of {len(some)}: {some[0]!r}")
model.save_pretrained(args.out)
