"""The three things that are trained, from one start: the same head, and the same R, W = R and b
= 0 in the edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reft_train.demo.baselines import HookedLoReFT
from reft_train.demo.encoder import load_encoder
from reft_train.demo.settings import Settings
from reft_train.pooling import HEAD, EncoderClassifier

FROZEN, TORCH, KERNELS = "frozen", "torch", "kernels"
VARIANTS = (FROZEN, TORCH, KERNELS)
TITLES = {
    FROZEN: "frozen model, trained head",
    TORCH: "LoReFT, plain PyTorch",
    KERNELS: "LoReFT, reft_kernels",
}


@dataclass
class Variant:
    """A model (token ids and mask in, logits out) and its trainable parameters: the edits' and
    the head's.
    """

    name: str
    model: nn.Module
    edits: list[nn.Parameter]
    head: list[nn.Parameter]

    def groups(self, settings: Settings) -> list[dict]:
        """Parameter groups for an optimizer. No decay: it would damage the plain baseline's R
        (see its module).
        """
        groups = [{"params": self.head, "lr": settings.head_lr}]
        if self.edits:
            groups.append({"params": self.edits, "lr": settings.lr})
        return groups

    @property
    def edit_count(self) -> int:
        """Trainable numbers of the edits, 2 d r + r for each layer."""
        return sum(parameter.numel() for parameter in self.edits)

    @property
    def head_count(self) -> int:
        """Trainable numbers of the head."""
        return sum(parameter.numel() for parameter in self.head)


def starting_rotations(settings: Settings, width: int) -> Tensor:
    """R of each edited layer at the start, ``[L, r, d]`` fp32, a function of the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    gaussian = torch.randn(
        len(settings.layers), width, settings.rank, dtype=torch.float64, generator=generator
    )
    return torch.linalg.qr(gaussian).Q.mT.to(torch.float32).contiguous()


def classifier(settings: Settings, num_labels: int) -> EncoderClassifier:
    """The model before anything is added to it."""
    return EncoderClassifier(load_encoder(Path(settings.model)), num_labels, settings.seed)


def add_reft(model: EncoderClassifier, settings: Settings, rotations: Tensor) -> nn.Module:
    """LoReFT by reft_kernels: a PEFT model, whose adapter holds the edits and the head."""
    from peft import get_peft_model

    from reft_kernels.integrations.peft import ReftConfig
    from reft_kernels.interventions import Intervention

    config = ReftConfig(
        layers=list(settings.layers),
        rank=settings.rank,
        positions=settings.positions,
        share_weights=True,
        intervention="loreft",
        component="block_output",
        activation="linear",
        dropout=0.0,
        parametrization="householder",
        init="identity",
        modules_to_save=[HEAD],
    )
    peft_model = get_peft_model(model, config)
    (stack,) = (module for module in peft_model.modules() if isinstance(module, Intervention))
    with (
        torch.no_grad()
    ):  # another orthonormal R, still the identity: the baseline starts from the same one
        stack.set_R(rotations)
        stack.W.copy_(stack.R)
    return peft_model


def load_reft(model: EncoderClassifier, folder: str | Path) -> nn.Module:
    """A fresh model with the adapter that was saved in ``folder``."""
    from peft import PeftModel

    import reft_kernels.integrations.peft  # noqa: F401  (registers the method, which the file names)

    return PeftModel.from_pretrained(model, str(folder))


def build(name: str, settings: Settings, num_labels: int) -> Variant:
    """A variant at its start, on the settings' device."""
    model: nn.Module = classifier(settings, num_labels)
    rotations = starting_rotations(settings, model.config.hidden_size)
    if name == TORCH:
        model = HookedLoReFT(model, settings.layers, rotations, settings.positions)
    elif name == KERNELS:
        model = add_reft(model, settings, rotations)
    elif name != FROZEN:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(VARIANTS)}")
    model.to(settings.device)
    named = [
        (path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad
    ]
    head = [parameter for path, parameter in named if f"{HEAD}." in path]
    edits = [parameter for path, parameter in named if f"{HEAD}." not in path]
    return Variant(name, model, edits, head)
