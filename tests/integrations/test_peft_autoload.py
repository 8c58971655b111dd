"""Loading ReFT adapters without importing reft_kernels, through the package's entry point.

Each test runs a program in a new process.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import VOCAB, make, shake

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ("torch.backends", "reft_kernels", "reft_kernels_autoload:watch_peft")


def declared() -> str:
    """The entry point in pyproject.toml, in the format of ``entry_points.txt``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    group, name, value = re.search(
        r'^\[project\.entry-points\."([^"]+)"\]\n(\w+) = "([^"]+)"$', text, re.MULTILINE
    ).groups()
    assert (group, name, value) == ENTRY
    return f"[{group}]\n{name} = {value}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the package's metadata, a small model, and adapters saved from it."""
    folder = tmp_path_factory.mktemp("autoload")
    metadata = folder / "path" / "reft_kernels-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: reft_kernels\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(declared())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    make("llama").save_pretrained(folder / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder / "base")
    for name, config in {
        "reft": ReftConfig(rank=4, positions="l1", task_type="CAUSAL_LM"),
        "lora": LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"),
    }.items():
        base = make("llama")
        base.name_or_path = str(folder / "base")
        model = get_peft_model(base, config).eval()
        shake(model)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            torch.save(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits, folder / f"{name}.pt")
    return folder


def run(place: Path, source: str, *front: Path, module: bool = False, **variables: str) -> str:
    """The output of a program in a new process, outside the project's folder."""
    program = place / "program.py"
    program.write_text("import sys\n" + textwrap.dedent(source))
    path = os.pathsep.join(map(str, [*front, place / "path", ROOT, ROOT / "python"]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    environment.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    command = [sys.executable, *(["-m", "program"] if module else [str(program)])]
    ended = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_peft_alone_loads_an_adapter_and_imports_nothing_before(place):
    run(
        place,
        """
        import peft
        assert not [m for m in sys.modules if m.startswith("reft_kernels.") or m == "reft_kernels"]
        assert peft.mapping.__loader__ is peft.mapping.__spec__.loader and "SourceFileLoader" in repr(peft.mapping.__loader__)
        from peft import AutoPeftModelForCausalLM, PeftConfig
        lora = AutoPeftModelForCausalLM.from_pretrained("lora")
        assert "reft_kernels" not in sys.modules
        assert type(PeftConfig.from_pretrained("reft")).__name__ == "ReftConfig"
        model = AutoPeftModelForCausalLM.from_pretrained("reft").eval()
        import torch
        x = torch.tensor([[5, 6, 7, 8]])
        assert torch.allclose(model(input_ids=x).logits, torch.load("reft.pt"), atol=1e-5)
        assert torch.allclose(lora.eval()(input_ids=x).logits, torch.load("lora.pt"), atol=1e-5)
        """,
    )


def test_transformers_alone_loads_an_adapter_folder_as_a_model(place):
    run(
        place,
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
        model = AutoModelForCausalLM.from_pretrained("reft").eval()
        import torch
        x = torch.tensor([[5, 6, 7, 8]])
        assert torch.allclose(model(input_ids=x).logits, torch.load("reft.pt"), atol=1e-5)
        text = pipeline("text-generation", model="reft", tokenizer=AutoTokenizer.from_pretrained("base"))
        out = text("w5 w6 w7 w8", max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
        ids = model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3, do_sample=False)[0, 4:]
        assert out.split() == [f"w{i}" for i in ids.tolist()], (out, ids)
        """,
        module=True,
    )


def test_without_autoload_the_import_that_the_card_names_is_enough(place):
    run(
        place,
        """
        from peft import AutoPeftModelForCausalLM
        try:
            AutoPeftModelForCausalLM.from_pretrained("reft")
        except KeyError as error:
            assert error.args == ("REFT",)
        else:
            raise SystemExit("loaded without autoload")
        line = next(l for l in open("reft/README.md") if l.startswith("import "))
        exec(line)
        AutoPeftModelForCausalLM.from_pretrained("reft")
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )


def test_a_package_that_cannot_be_imported_stops_its_own_adapters_only(place, tmp_path):
    (tmp_path / "reft_kernels").mkdir()
    (tmp_path / "reft_kernels" / "__init__.py").write_text("raise OSError('a library is missing')")
    run(
        place,
        """
        import importlib
        from peft import AutoPeftModelForCausalLM, PeftConfig, PEFT_TYPE_TO_CONFIG_MAPPING as table
        AutoPeftModelForCausalLM.from_pretrained("lora")
        for _ in range(2):
            try:
                PeftConfig.from_pretrained("reft")
            except ImportError as error:
                assert "needs reft_kernels, whose import failed: a library is missing" in str(error)
                assert isinstance(error.__cause__, OSError)
            else:
                raise SystemExit("loaded")
        try:
            table["OTHER"]
        except KeyError as error:
            assert error.args == ("OTHER",)
        assert "REFT" not in table and table.get("REFT") is None and "LORA" in table
        """,
        tmp_path,
    )


# a stub of PEFT without torch, to test the finder and the loader
FAKE = {
    "__init__": "from peft import mapping",
    "mapping": "PEFT_TYPE_TO_CONFIG_MAPPING = {'LORA': int}",
}
FRONT = "import reft_kernels_autoload as autoload\nautoload.watch_peft(); autoload.watch_peft()\n"


def fake(place: Path, tmp_path: Path, source: str, **files: str) -> str:
    (tmp_path / "peft").mkdir()
    for name, content in {**FAKE, **files}.items():
        (tmp_path / "peft" / f"{name}.py").write_text(content)
    return run(place, FRONT + textwrap.dedent(source), tmp_path)


def test_the_module_imports_neither_torch_nor_the_package(place, tmp_path):
    source = """
    assert sum(type(f).__name__ == "_Finder" for f in sys.meta_path) == 1
    assert not {"torch", "reft_kernels", "peft", "warnings.catch"} & set(sys.modules)
    import peft.mapping
    assert type(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) is autoload.MethodTable
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING == {"LORA": int}
    """
    fake(place, tmp_path, source)


def test_a_half_imported_peft_is_found(place, tmp_path):
    """PEFT is only partly imported if it is PEFT that imports torch."""
    source = (
        "import peft; assert isinstance(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, dict) and "
        "peft.kind != 'dict'"
    )
    init = (
        "import reft_kernels_autoload; sys = __import__('sys'); sys.meta_path[:] = "
        "sys.meta_path[1:]\n"
        "reft_kernels_autoload.watch_peft()\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING "
        "as t\nkind = type(t).__name__"
    )
    fake(place, tmp_path, source, __init__=init)


def test_reload_works_and_gives_the_table_again(place, tmp_path):
    source = """
    import importlib, inspect, peft.mapping
    before = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    again = importlib.reload(peft.mapping)
    assert again is sys.modules["peft.mapping"] and again.PEFT_TYPE_TO_CONFIG_MAPPING is not before
    assert type(again.PEFT_TYPE_TO_CONFIG_MAPPING) is autoload.MethodTable
    importlib.reload(peft)
    assert "LORA" in inspect.getsource(peft.mapping) and importlib.util.find_spec("peft.mapping") is again.__spec__
    """
    fake(place, tmp_path, source)


def test_an_error_in_peft_itself_is_the_users_to_see(place, tmp_path):
    source = """
    for _ in range(2):
        try:
            import peft.mapping
        except ImportError as error:
            assert error.name == "a_module_that_is_not_there"
        else:
            raise SystemExit("swallowed")
    """
    fake(place, tmp_path, source, mapping="import a_module_that_is_not_there")


@pytest.mark.parametrize("index", [0, 99])
def test_another_finder_that_asks_all_the_others_does_not_recurse(index, place, tmp_path):
    source = f"""
    class Other:
        def find_spec(self, name, path=None, target=None):
            if name == "peft.mapping":
                found = [f.find_spec(name, path, target) for f in sys.meta_path if f is not self]
                return next((f for f in found if f is not None), None)
    sys.meta_path.insert({index}, Other())
    import peft.mapping
    assert type(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING) is autoload.MethodTable
    """
    fake(place, tmp_path, source)


def test_a_peft_without_the_table_is_left_alone_with_a_warning(place, tmp_path):
    source = """
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import peft.mapping
    assert peft.mapping.other == 1 and "import reft_kernels.integrations.peft" in str(seen[0].message)
    """
    fake(place, tmp_path, source, mapping="other = 1")


def test_many_threads_import_and_look_up_at_once(place, tmp_path):
    source = """
    import threading, importlib
    sys.setswitchinterval(1e-6)
    found, start = [], threading.Barrier(16)
    def work(i):
        start.wait()
        table = importlib.import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
        found.append((type(table).__name__, table["REFT"]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert found == [("MethodTable", "found")] * 16, found
    """
    package = tmp_path / "reft_kernels" / "integrations"
    (package / "peft").mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "peft" / "__init__.py").write_text(
        "import time; time.sleep(0.05)\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as "
        "t\nt['REFT'] = 'found'"
    )
    fake(place, tmp_path, source)


def test_what_is_installed_here_declares_the_entry_point():
    try:
        installed = importlib.metadata.distribution("reft_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("reft_kernels is not installed in this environment: run from its folder alone")
    if not any(e.group == ENTRY[0] for e in installed.entry_points):
        pytest.skip(
            "reft_kernels was installed here before it had this entry point: pip install -e . again"
        )
    assert ENTRY in [(e.group, e.name, e.value) for e in installed.entry_points]
