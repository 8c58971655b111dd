"""Interrupted saves over an existing adapter: either the old or the new adapter loads."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.integrations.peft.atomic import SCRATCH
from tests.model.families import batch, make, shake

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OLD = {"rank": 4, "positions": "l1"}
NEW = {"rank": 4, "positions": "f2", "layers": "all"}  # same shapes: only positions tell them apart


def build(settings=OLD, seed: int = 1, **names):
    model = get_peft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", **settings), **names)
    shake(model, seed=seed)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.eval()(**batch("llama")).logits


def loaded(folder) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(make("llama"), folder))


class Cut(BaseException):
    """Simulates a crash."""


def cut(monkeypatch, after: int, folder=None) -> None:
    """Simulate a crash instead of rename number ``after``; cleanup does not run either."""
    real, seen = os.replace, []

    def replace(source, target):
        if folder is not None and str(folder) not in str(target):
            return real(source, target)
        seen.append(target)
        if len(seen) > after:
            raise Cut
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize(
    "new", [NEW, {"rank": 2, "positions": "f1+l1"}], ids=["same shapes", "other rank"]
)
def test_a_save_cut_short_leaves_the_old_adapter_or_the_new_one(after, new, tmp_path, monkeypatch):
    before, after_it = build(), build(new, seed=2)
    before.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        cut(patch, after)
        try:
            after_it.save_pretrained(tmp_path)
            finished = True
        except Cut:
            finished = False
    assert finished == (after >= 3)
    expected = logits(before) if after == 0 else logits(after_it)
    assert torch.equal(loaded(tmp_path), expected)
    after_it.save_pretrained(tmp_path)  # the next save completes the folder
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ReftConfig.from_pretrained(tmp_path)
    assert torch.equal(loaded(tmp_path), logits(after_it))


def test_the_loading_of_a_save_cut_short_says_so(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        cut(patch, 1)
        with pytest.raises(Cut):
            build(NEW, seed=2).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="interrupted before it replaced adapter_config.json"):
        found = ReftConfig.from_pretrained(str(tmp_path))
    assert found.positions == "f2"
    model = build()
    with pytest.warns(UserWarning, match="interrupted"):
        model.load_adapter(str(tmp_path), adapter_name="other")
    assert model.peft_config["other"].positions == "f2"


def test_a_crash_while_the_weights_are_written_leaves_the_old_adapter(tmp_path, monkeypatch):
    before = build()
    before.save_pretrained(tmp_path)

    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        raise Cut

    monkeypatch.setattr(peft.peft_model, "safe_save_file", half)
    with pytest.raises(Cut):
        build(NEW, seed=2).save_pretrained(tmp_path)
    assert torch.equal(loaded(tmp_path), logits(before))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(SCRATCH)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_killed_process(tmp_path, monkeypatch):
    before, after_it = build(), build(NEW, seed=2)
    before.save_pretrained(tmp_path)
    child = os.fork()
    if child == 0:
        real = os.replace

        def replace(source, target):
            if str(target).endswith(CONFIG):
                os._exit(9)
            real(source, target)

        os.replace = replace
        after_it.save_pretrained(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert torch.equal(loaded(tmp_path), logits(after_it))


@pytest.mark.parametrize("after", range(3))
def test_a_named_adapter_in_its_own_folder(after, tmp_path, monkeypatch):
    before, after_it = build(adapter_name="steer"), build(NEW, seed=2, adapter_name="steer")
    before.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        cut(patch, after, tmp_path / "steer")
        with pytest.raises(Cut):
            after_it.save_pretrained(tmp_path)
    expected = logits(before) if after == 0 else logits(after_it)
    assert torch.equal(loaded(tmp_path / "steer"), expected)


@pytest.mark.parametrize("after", range(4))
def test_over_an_adapter_of_another_method_nothing_is_mixed(after, tmp_path, monkeypatch):
    lora = get_peft_model(
        make("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"])
    )
    lora.save_pretrained(tmp_path)
    model = build()
    with monkeypatch.context() as patch:
        cut(patch, after)
        try:
            model.save_pretrained(tmp_path)
        except Cut:
            assert after < 3
    if after == 1:
        with pytest.raises(ValueError, match="foreign keys"):
            loaded(tmp_path)
    else:
        assert torch.equal(loaded(tmp_path), logits(lora if after == 0 else model))


@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("kind", ["earlier", "torch", "to torch"])
def test_over_a_folder_of_an_earlier_version_or_another_format(kind, after, tmp_path, monkeypatch):
    before, after_it = build(), build(NEW, seed=2)
    before.save_pretrained(tmp_path, safe_serialization=kind != "torch")
    if kind == "earlier":  # no id in either file
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
        content = json.loads((tmp_path / CONFIG).read_text())
        del content["save_id"]
        (tmp_path / CONFIG).write_text(json.dumps(content))
    assert torch.equal(loaded(tmp_path), logits(before))
    with monkeypatch.context() as patch:
        cut(patch, after)
        with pytest.raises(Cut):
            after_it.save_pretrained(tmp_path, safe_serialization=kind != "to torch")
    old = after == 0 or kind == "to torch"  # weights of the other format are removed last
    assert torch.equal(loaded(tmp_path), logits(before) if old else logits(after_it))


def test_a_folder_that_was_saved_by_torch_is_replaced_by_safetensors_and_back(tmp_path):
    first, second = build(), build(NEW, seed=2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(loaded(tmp_path), logits(second))
    first.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(loaded(tmp_path), logits(first))


def test_what_users_change_by_hand_holds(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**content, "positions": "f3"}))
    assert ReftConfig.from_pretrained(tmp_path).positions == "f3"
    config = ReftConfig.from_pretrained(tmp_path)
    config.positions = "f4"
    config.save_pretrained(tmp_path)
    assert ReftConfig.from_pretrained(tmp_path).positions == "f4"
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # without metadata
    assert ReftConfig.from_pretrained(tmp_path).positions == "f4"


def test_two_saves_of_one_adapter_are_the_same_bytes(tmp_path):
    model = build()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    for name in (WEIGHTS, CONFIG, "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        (WEIGHTS, CONFIG, "README.md")
    )


def test_other_processes_and_other_methods_save_as_ever(tmp_path):
    build().save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not list((tmp_path / "rank1").glob("*"))
    lora = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["o_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "save_id" not in json.loads((tmp_path / "lora" / CONFIG).read_text())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        build().save_pretrained(tmp_path / "file")
