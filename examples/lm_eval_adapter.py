"""Scoring a saved adapter with lm-evaluation-harness on a task file of one's own.

    python examples/lm_eval_adapter.py MODEL ADAPTER

No registration is needed: the harness's ``peft`` argument finds the method. On the command line:

    lm_eval run --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks piqa \\
        --apply_chat_template
"""

import argparse
import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("adapter", nargs="?", help="none: the frozen model alone")
args = parser.parse_args()

TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list:
  - metric: acc
"""
QUESTIONS = {"Is snow white?": 0, "Is grass red?": 1, "Is coal black?": 0, "Is blood green?": 1}

with tempfile.TemporaryDirectory() as folder:
    data, task = Path(folder, "colours.json"), Path(folder, "colours.yaml")
    rows = [{"question": question, "label": label} for question, label in QUESTIONS.items()]
    data.write_text(json.dumps(rows), encoding="utf-8")
    task.write_text(TASK.format(file=data), encoding="utf-8")
    for adapter in dict.fromkeys([None, args.adapter]):
        model = {"pretrained": args.model, "dtype": "float32"}
        if adapter is not None:
            model["peft"] = adapter
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=model,
            tasks=["colours"],
            task_manager=TaskManager(include_path=folder),
            device="cpu",
            batch_size=4,
            apply_chat_template=True,
            bootstrap_iters=0,
        )
        scores = results["samples"]["colours"]
        right = [round(sample["acc"]) for sample in scores]
        likelihoods = [round(sample["resps"][0][0][0], 2) for sample in scores]
        print("adapter" if adapter else "frozen", right, likelihoods)

# prints, with SmolLM2-135M-Instruct:
# with the adapter of load_adapter.py:
# frozen [0, 1, 0, 1] [-12.94, -12.6, -13.12, -13.78]
# adapter [0, 1, 1, 1] [-17.89, -17.24, -17.4, -16.76]
