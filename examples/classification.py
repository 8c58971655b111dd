"""Sequence classification with an encoder, as for a task of GLUE: sentences with two classes.

    python examples/classification.py [MODEL]

An encoder's text is prompt as a whole, so ``f1`` edits the token that the classifier reads. The
classifier is trained and saved beside the edits: ``modules_to_save``.
"""

import argparse

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from reft_kernels.integrations.peft import ReftConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--out", default="runs/examples/classification")
args = parser.parse_args()

GOOD = ("a lovely film", "great acting", "I enjoyed it", "a wonderful story", "simply the best")
BAD = ("a dull film", "poor acting", "I hated it", "a terrible story", "simply the worst")
TEST = {"text": ["a great story", "an awful film"], "label": [1, 0]}
tokenizer = AutoTokenizer.from_pretrained(args.model)


def rows(texts, labels):
    return [{**tokenizer(text), "label": label} for text, label in zip(texts, labels, strict=True)]


def base():
    return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)


train = Dataset.from_list(rows(GOOD + BAD, [1] * len(GOOD) + [0] * len(BAD)))
test = Dataset.from_list(rows(TEST["text"], TEST["label"]))
reft = ReftConfig(
    task_type="SEQ_CLS", layers="all", rank=4, positions="f1", modules_to_save=["classifier"]
)
model = get_peft_model(base(), reft)
model.print_trainable_parameters()
settings = TrainingArguments(
    output_dir=args.out,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=10,
    learning_rate=5e-3,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
)


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


collator = DataCollatorWithPadding(tokenizer)
options = {"data_collator": collator, "compute_metrics": accuracy}
trainer = Trainer(model, settings, train_dataset=train, eval_dataset=test, **options)
trainer.train()
print("loss:", [round(e["loss"], 3) for e in trainer.state.log_history if "loss" in e])
print("accuracy:", trainer.evaluate()["eval_accuracy"])
model.save_pretrained(args.out)

loaded = PeftModel.from_pretrained(base(), args.out)
again = Trainer(loaded, settings, eval_dataset=test, **options)
print("loaded:", again.evaluate()["eval_accuracy"])

# prints, with all-MiniLM-L6-v2:
# loss: [0.679, 0.598, 0.444, 0.328]
# accuracy: 1.0
# loaded: 1.0
