"""Several processes share the rows, and each has the full score in the end."""

from __future__ import annotations

import json
import os
import socket
import sys

import pytest
import torch
from torch import multiprocessing

from tests.reft_train.evaluation.conftest import CAPITALS, adapted


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _work(rank: int, processes: int, port: int, model: str, out: str, batch_size: int) -> None:
    from reft_train import tasks
    from reft_train.evaluation.scoring import score_set
    from reft_train.ranks import join, leave
    from reft_train.tasks.base import Row

    torch.set_num_threads(1)
    config, loaded = adapted(model, task="jsonl")
    rows = [Row({"prompt": text, "completion": "x"}, "row") for text in CAPITALS]
    calls = []
    replaced = loaded.model.generate
    loaded.model.generate = lambda **inputs: (
        calls.append(len(inputs["input_ids"])) or replaced(**inputs)
    )
    if processes > 1:  # as torchrun starts them
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        join(cpu=True)
    config = config.replace(eval_batch_size=batch_size)
    predictions = score_set(
        "here", rows, loaded, tasks.get("jsonl"), config, progress=False
    ).predictions
    if processes > 1:
        leave()
    with open(os.path.join(out, f"{processes}-{rank}.json"), "w") as file:
        json.dump([predictions, calls], file)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over TCP as used here is a POSIX matter")
def test_every_process_has_every_prediction_after_its_share_of_forwards(tiny_llama, tmp_path):
    _work(0, 1, 0, str(tiny_llama), str(tmp_path), 2)
    multiprocessing.spawn(_work, (2, _free_port(), str(tiny_llama), str(tmp_path), 2), nprocs=2)
    alone, *shared = [
        json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")
    ]
    assert alone[1] == [2, 2, 2, 1]
    # seven rows: four each, one of them twice, so that every process does two forwards
    assert [calls for _, calls in shared] == [[2, 2], [2, 2]]
    assert all(predictions == alone[0] for predictions, _ in shared)
