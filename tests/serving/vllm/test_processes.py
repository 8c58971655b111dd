"""Engines in processes of their own: one, two with tensor parallelism; compiled graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.vllm import models

ROOT = Path(__file__).resolve().parents[3]
COUNT = 8
NAMES = ("ends", "last", "everything", "tanh", "untied")


@pytest.fixture(scope="module")
def case(folders):
    """A model with adapters, requests and the tokens of transformers and PEFT."""
    folder = folders / "processes"
    model = models.make_model("llama", folder / "model")
    adapters = {name: models.ADAPTERS[name] for name in NAMES}
    peft = models.make_adapters(model, folder / "adapters", adapters)
    requests = [(p, a) for p in models.prompts((5, 40, 70)) for a in (None, *NAMES)]
    told = {
        "model": str(folder / "model"),
        "adapters": {name: str(folder / "adapters" / name) for name in NAMES},
        "requests": requests,
        "count": COUNT,
    }
    return told, [models.generate(peft, p, a, COUNT) for p, a in requests]


def _run(case, ranks: int, environment: dict[str, str] | None = None, **options) -> None:
    told, wanted = case
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.vllm.in_a_process", json.dumps({**told, "options": options})],
        cwd=ROOT,
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["tokens"] == wanted + wanted  # cold, then from the cache
    reason, message, tokens = result["bad"]
    assert reason == "error" and "'unknown'" in message and tokens == []
    assert result["base"] == wanted[0]  # the engine is alive
    assert len(result["failures"]) == 2 and all("/nothing" in f for f in result["failures"])
    assert result["listed"] == [list(NAMES[:-1])] * ranks


def test_an_engine_in_a_process_of_its_own(case):
    _run(case, 1)


@pytest.mark.full
def test_tensor_parallelism_over_two_processes(case):
    _run(case, 2, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, tensor_parallel_size=2)


@pytest.mark.full
def test_compiled_graphs(case):
    _run(case, 1, enforce_eager=False)


@pytest.mark.full
def test_the_second_model_runner(case):
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        pytest.skip("vLLM's V2 model runner needs Triton with a backend for this device")
    _run(case, 1, {"VLLM_USE_V2_MODEL_RUNNER": "1"})
