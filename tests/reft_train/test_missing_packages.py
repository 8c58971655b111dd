"""A program without one of its packages says which one, and how to get it."""

from __future__ import annotations

import sys

import pytest
from reft_train.__main__ import main


@pytest.fixture
def _modules_of_before():
    """Modules that the test imports anew have classes of their own: later tests must not meet
    them.
    """
    before = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "reft_train"
    }
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "reft_train"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.usefixtures("_modules_of_before")
@pytest.mark.parametrize("module", ["yaml", "transformers", "datasets"])
def test_a_missing_package_is_named_in_one_line(module, monkeypatch, tmp_path, capsys):
    for name in [
        name
        for name in sys.modules
        if name.partition(".")[0] in (module, "reft_train") and "__main__" not in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "run.yaml").write_text("model: somewhere\ntask: boolq\n")
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"the module {module} is not installed" in error


def test_a_missing_module_of_the_program_is_a_bug_and_raises(monkeypatch):
    from reft_train import run

    def broken(parsed):
        raise ModuleNotFoundError("no module named reft_train.nowhere", name="reft_train.nowhere")

    monkeypatch.setattr(run, "run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["run", "--model", "m", "--task", "boolq"])
