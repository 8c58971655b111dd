"""Damaged, foreign or malicious folders: one clear error, nothing executed, nothing written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.command_line import refused


class Bomb:
    """Creates a file when it is unpickled without ``weights_only``."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pyreft", "hub"])
def test_no_file_is_executed(tmp_path, capsys, form, request):
    folder = request.getfixturevalue(form)
    victim = next(folder.glob("*.bin"))
    torch.save({"weight": Bomb(tmp_path / "executed")}, victim)
    capsys.readouterr()
    refused(
        capsys,
        tmp_path,
        "cannot be loaded as a state dict (weights only)",
        folder,
        tmp_path / "out",
        "--to",
        "peft",
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "list", "missing"])
@pytest.mark.parametrize("form", ["peft", "pyreft", "hub"])
def test_damaged_weights(tmp_path, capsys, form, damage, request):
    folder = request.getfixturevalue(form)
    victim = sorted([*folder.glob("*.bin"), *folder.glob("adapter_model.safetensors")])[0]
    data = victim.read_bytes()
    if damage == "list":
        torch.save([torch.zeros(2)], victim)
    elif damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(
            {"truncated": data[: len(data) // 2], "garbage": b"\x00\x13garbage" * 50, "empty": b""}[
                damage
            ]
        )
    capsys.readouterr()
    target = {"peft": "pyreft"}.get(form, "peft")
    refused(capsys, tmp_path, victim.name, folder, tmp_path / "out", "--to", target)


@pytest.mark.parametrize("text", ["", "{", "[]", '"words"', "\xff"])
@pytest.mark.parametrize("form", ["peft", "pyreft", "hub"])
def test_damaged_configurations(tmp_path, capsys, form, text, request):
    folder = request.getfixturevalue(form)
    name = "config.json" if form == "pyreft" else "adapter_config.json"
    (folder / name).write_bytes(text.encode("latin-1"))
    capsys.readouterr()
    refused(
        capsys,
        tmp_path,
        name,
        folder,
        tmp_path / "out",
        "--to",
        "pyreft" if form == "peft" else "peft",
    )


def _edit_first(folder, change) -> None:
    victim = sorted([*folder.glob("*.bin"), *folder.glob("adapter_model.safetensors")])[0]
    tensors = (
        load_file(victim)
        if victim.suffix == ".safetensors"
        else torch.load(victim, weights_only=True)
    )
    change(tensors)
    if victim.suffix == ".safetensors":
        save_file(tensors, victim)
    else:
        torch.save(tensors, victim)


@pytest.mark.parametrize("form", ["peft", "pyreft", "hub"])
@pytest.mark.parametrize(
    "damage", ["lacks one", "has another", "other shape", "other dimensions", "integers"]
)
def test_tensors_that_do_not_fit(tmp_path, capsys, form, damage, request):
    folder = request.getfixturevalue(form)

    def change(tensors):
        name = next(k for k in tensors if k.endswith((".W", "learned_source.weight", "weight")))
        if damage == "lacks one":
            del tensors[name]
        elif damage == "has another":
            tensors[f"{name}_more"] = torch.zeros(2)
        elif damage == "other shape":
            tensors[name] = tensors[name][..., :-1].contiguous()
        elif damage == "other dimensions":
            tensors[name] = tensors[name].flatten()
        else:
            tensors[name] = tensors[name].to(torch.int32)

    _edit_first(folder, change)
    capsys.readouterr()
    refused(
        capsys,
        tmp_path,
        "",
        folder,
        tmp_path / "out",
        "--to",
        "pyreft" if form == "peft" else "peft",
    )


def test_an_R_that_is_not_orthonormal(tmp_path, capsys, pyreft):
    _edit_first(pyreft, lambda tensors: tensors["rotate_layer"].mul_(1.5))
    capsys.readouterr()
    arguments = (pyreft, tmp_path / "out", "--to", "peft", "--positions", "f3+l2")
    refused(capsys, tmp_path, "layer 0: R: rows are not orthonormal", *arguments)


def test_no_folder_and_no_format(tmp_path, capsys):
    refused(
        capsys, tmp_path, "is not a folder", tmp_path / "none", tmp_path / "out", "--to", "peft"
    )
    (tmp_path / "empty").mkdir()
    refused(
        capsys, tmp_path, "is no known format", tmp_path / "empty", tmp_path / "out", "--to", "peft"
    )


def test_edits_of_several_widths(tmp_path, capsys, peft):
    _edit_first(
        peft,
        lambda tensors: tensors.update(
            {k.replace(".d32.", ".d64."): t.clone() for k, t in tensors.items()}
        ),
    )
    refused(
        capsys,
        tmp_path,
        "edits of several widths [32, 64]",
        peft,
        tmp_path / "out",
        "--to",
        "pyreft",
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layers": ["a", "b", "c"]}, "malformed peft folder"),
        ({"dropout": "much"}, "malformed peft folder"),
        ({"dropout": None}, "malformed peft folder"),
        ({"layers": 3}, "layers: got 3"),
        ({"peft_type": "LORA"}, "is 'LORA'"),
        ({"intervention": "x"}, "intervention: got 'x'"),
        ({"parametrization": "x"}, "parametrization: got 'x'"),
        ({"positions": "x"}, "positions: got 'x'"),
    ],
)
def test_settings_of_a_foreign_type(tmp_path, capsys, peft, change, expected):
    content = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(content | change))
    refused(capsys, tmp_path, expected, peft, tmp_path / "out", "--to", "pyreft")
