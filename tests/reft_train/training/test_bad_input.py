"""Bad input ends a run with exit code 2, one line that says what is wrong, and no output folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.reft_train.runs import adapter_bytes, boolq, instructions, run, write_rows


@pytest.fixture
def refused(tmp_path, capfd):
    """Runs a command that must be refused, and gives its last line."""

    def check(model, **settings) -> str:
        given = {"train": write_rows(tmp_path / "rows.jsonl", instructions(8)), **settings}
        output = tmp_path / "run"
        assert run(model, output, **given) == 2
        text = capfd.readouterr().err
        assert not output.exists()
        last = text.rstrip("\n").splitlines()[-1]
        assert last.startswith("reft_train run: error: ") and text.count("error: ") == 1
        return last.removeprefix("reft_train run: error: ")

    return check


def test_a_model_folder_that_is_not_there(refused, tmp_path):
    line = refused(tmp_path / "nothing")
    assert line.startswith(f"model: got '{tmp_path / 'nothing'}', which does not exist")


def test_a_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path / "empty")
    assert f"model: got '{tmp_path / 'empty'}', without config.json, expected a folder" in line


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_with_a_broken_file(broken, refused, tiny_llama, tmp_path):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / broken).write_text("{", encoding="utf-8")
    assert refused(model).startswith(f"model: got '{model}', ")


@pytest.mark.parametrize("absent", ["model.safetensors", "tokenizer.json"])
def test_a_model_without_a_file(absent, refused, tiny_llama, tmp_path):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / absent).unlink()
    assert refused(model).startswith(f"model: got '{model}', ")


def test_a_model_of_an_unknown_type(refused, tiny_llama, tmp_path):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(
        json.dumps(values | {"model_type": "no-such-type"}), encoding="utf-8"
    )
    assert refused(model).startswith(f"model: got '{model}', which cannot be loaded")


def test_a_hub_name_without_a_network(refused, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused("nobody/no-such-model").startswith(
        "model: got 'nobody/no-such-model', which cannot be loaded"
    )


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"task": "comonsense"}, "task: got 'comonsense', expected one of"),
        ({"recipe": "papers"}, "recipe: got 'papers', expected one of"),
        ({"layers": "0;9"}, "layers"),
        ({"rank": 64}, "rank"),
        ({"rank": 0}, "rank: got '0', expected greater than or equal to 1"),
        ({"component": "no_such_part"}, "component"),
        ({"train": "no-such-file.jsonl"}, "--train: got no-such-file.jsonl, which does not exist"),
        ({"validation": 8}, "validation: got 8 of 8 training rows"),
        (
            {"task": "commonsense", "data": "no-such-folder"},
            "--data: got no-such-folder, which is missing",
        ),
        ({"lora_targets": ["no_such_module"], "method": "lora"}, "no_such_module"),
        ({"deepspeed": "no-such.json"}, "deepspeed: got no-such.json"),
        ({"mixed_precision": "fp16"}, "mixed_precision: got fp16 on a CPU"),
        ({"device": "cuda"}, "device: got cuda"),
        ({"fsdp": True}, "fsdp: got true in a single process"),
        ({"architecture": "seq2seq"}, "model: got"),
        ({"method": "head"}, "method: got 'head'"),
        ({"attention": "no_such_attention"}, "no_such_attention"),
    ],
    ids=str,
)
def test_wrong_settings(settings, complaint, refused, tiny_llama, request):
    if settings.get("device") == "cuda" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    assert complaint in refused(tiny_llama, **settings)


def test_packing_on_an_encoder(refused, tiny_bert, tmp_path):
    rows = write_rows(tmp_path / "boolq.jsonl", boolq(8))
    assert refused(tiny_bert, task="boolq", train=rows, packing=True).startswith(
        "packing: got true with a classification model"
    )


def test_generating_with_an_encoder(refused, tiny_bert):
    assert refused(tiny_bert).startswith("task: got 'jsonl', which generates text, with bert")


ROWS = [
    ({"instruktion": "a", "output": "b"}, "expected instruction"),
    ({"instruction": "a", "outputt": "b"}, "expected output"),
    ({"instruction": " ", "output": "b"}, "instruction: got no text, expected some"),
    ({"instruction": 3, "output": "b"}, "instruction: got 3 (int), expected a string"),
    ({"text": "a"}, "got fields text, expected messages, or prompt and completion"),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize(
    "row, complaint", ROWS, ids=[next(iter(row)) + str(i) for i, (row, _) in enumerate(ROWS)]
)
def test_a_wrong_row_is_named(row, complaint, streaming, refused, tiny_llama, tmp_path):
    rows = [*instructions(4), row, *instructions(4)]
    path = write_rows(tmp_path / "wrong.jsonl", rows)
    settings = {"streaming": True, "max_steps": 4, "shuffle_buffer": 1} if streaming else {}
    line = refused(tiny_llama, train=path, **settings)
    assert f"line 5 of {path}" in line and complaint in line


def test_a_wrong_row_of_a_test_set_is_found_before_the_training(refused, tiny_llama, tmp_path):
    path = write_rows(
        tmp_path / "test.jsonl", [*instructions(2), {"instruction": "", "output": "b"}]
    )
    assert f"line 3 of {path}: instruction: got no text" in refused(tiny_llama, test=[path])


def test_a_label_outside_the_set(refused, tiny_bert, tmp_path):
    rows = boolq(6)
    rows[3]["answer"] = "maybe"
    path = write_rows(tmp_path / "boolq.json", rows)
    line = refused(tiny_bert, task="boolq", train=path)
    assert f"row 4 of {path}: answer: got 'maybe', expected one of true, false" in line


def test_a_line_that_is_not_json(refused, tiny_llama, tmp_path):
    path = write_rows(tmp_path / "broken.jsonl", instructions(2))
    path.write_text(path.read_text(encoding="utf-8") + "{'a': 1}\n", encoding="utf-8")
    assert (
        "after line 2" in (line := refused(tiny_llama, train=path)) and "line 3, column 2" in line
    )


def test_a_long_prompt_is_cut_and_counted(tiny_llama, tmp_path, capfd):
    rows = [*instructions(3), {"instruction": "how many " * 400, "output": "He has 3"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert run(tiny_llama, tmp_path / "run", train=path, skip_test=True, max_length=96) == 0
    text = "training rows: 1 of 4 prompts and 0 targets truncated to max_length 96"
    assert text in capfd.readouterr().err


@pytest.mark.parametrize(
    "more", [{}, {"streaming": True, "max_steps": 2}], ids=["whole", "streamed"]
)
def test_rows_that_lose_their_prompt_are_dropped_and_counted(more, tiny_llama, tmp_path, capfd):
    rows = [*instructions(5), {"instruction": "how many", "output": "He has 3 " * 200}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"train": path, "skip_test": True, "max_length": 96, **more}
    assert run(tiny_llama, tmp_path / "run", **settings) == 0
    text = "training rows: 1 of 6 dropped: max_length 96 leaves them no prompt or no answer"
    assert text in capfd.readouterr().err
    write_rows(path, rows[5:])
    assert run(tiny_llama, tmp_path / "other", **settings) == 2
    assert "which leaves no row both a prompt and an answer" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_to(tiny_llama, tmp_path, capfd):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    else:
        (tmp_path / "file").mkdir(mode=0o555)
    path = write_rows(tmp_path / "rows.jsonl", instructions(4))
    assert run(tiny_llama, tmp_path / "file" / "run", train=path, cache=tmp_path / "cache") == 2
    assert "error: output: got" in capfd.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_model_is_refused_on_resuming(tiny_llama, tmp_path, capfd):
    from tests.reft_train.tiny import save_llama

    path = write_rows(tmp_path / "rows.jsonl", instructions(8))
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    assert run(model, tmp_path / "run", train=path, skip_test=True) == 0
    before = adapter_bytes(tmp_path / "run" / "adapter")
    shutil.rmtree(model)
    save_llama(model)
    values = json.loads((model / "config.json").read_text(encoding="utf-8")) | {
        "num_hidden_layers": 1
    }
    (model / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert run(model, tmp_path / "run", train=path, skip_test=True, resume=True) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert (
        "got a model with num_hidden_layers 1, but" in line
        and "was trained with num_hidden_layers 2" in line
    )
    assert adapter_bytes(tmp_path / "run" / "adapter") == before
