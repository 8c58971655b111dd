"""Folders of many random adapters of one model, for the benchmark of serving."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from reft_kernels.integrations.peft import ReftConfig

POSITIONS = "f7+l7"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SCALE = 0.02  # edits that change answers and leave hidden states finite


class Folders:
    """Folders of adapters, written when they are asked for.

    Args:
        model: folder of the base model.
        scratch: where they are written.
        rank: of all adapters.
    """

    def __init__(self, model: Path, scratch: Path, rank: int) -> None:
        self._model, self._scratch, self._rank = model, scratch, rank

    def reft(self, count: int) -> dict[str, Path]:
        """Return LoReFT adapters of every layer by name."""
        config = ReftConfig(
            task_type="CAUSAL_LM", layers="all", rank=self._rank, positions=POSITIONS
        )
        return self._folders("reft", count, config)

    def lora(self, count: int) -> dict[str, Path]:
        """Return LoRA adapters of the attention projections by name."""
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=self._rank, target_modules=TARGETS)
        return self._folders("lora", count, config)

    def _folders(self, kind: str, count: int, config: peft.PeftConfig) -> dict[str, Path]:
        folders = {f"{kind}{n}": self._scratch / kind / str(n) for n in range(count)}
        missing = {n: folder for n, folder in enumerate(folders.values()) if not folder.exists()}
        if not missing:
            return folders
        template = self._scratch / f"{kind}-template"
        if not template.exists():
            base = transformers.AutoModelForCausalLM.from_pretrained(
                self._model, dtype=torch.float32
            )
            peft.get_peft_model(base, config).save_pretrained(template)
        for number, folder in missing.items():
            _randomized(template, folder, number)
        return folders


def _randomized(template: Path, folder: Path, seed: int) -> None:
    """Copy an adapter folder with other weights, without building its model again."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json",):
        (folder / name).write_bytes((template / name).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    with safe_open(template / "adapter_model.safetensors", "pt") as file:
        tensors = {
            key: SCALE * torch.randn(file.get_tensor(key).shape, generator=generator)
            for key in file.keys()  # noqa: SIM118, it is no mapping
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata=file.metadata())
