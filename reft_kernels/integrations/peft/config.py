"""What a user says about a ReFT adapter: a PEFT configuration, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import ClassVar

from peft.config import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from reft_kernels import positions as positions_module
from reft_kernels.activations import canonical_activation
from reft_kernels.integrations.peft import saving
from reft_kernels.integrations.peft.register import REFT
from reft_kernels.integrations.response_template import checked_template
from reft_kernels.interventions import INITS, STACKED
from reft_kernels.model.selection import PositionRule
from reft_kernels.parametrization import MAX_RANK, PARAMETRIZATIONS
from reft_kernels.positions import Spec


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass
class ReftConfig(PeftConfig):
    """Configuration of a ReFT adapter: h + R^T (W h + b - R h) at chosen tokens of chosen layers,
    and its family.

    Args:
        layers: "all" or a list of layer numbers.
        rank: r, 1 to 256.
        positions: tokens to edit: "f7+l7" (first and last n of the prompt), "f3", "l1", "prompt" or
            "all".
        share_weights: False gives first and last positions their own weights ("fN+lM" only).
        pyreft_positions: count first and last tokens as pyreft's ReftDataset classes do: without
        the prompt's last token, and never more than half of the rest. The paper's script counts the
        last token, as False does.
        response_template: what stands right before a response, such as a chat template's assistant
            header: token ids, a list of alternatives (each of them token ids), or ``(text,
            tokenizer)``. A prompt ends after its last occurrence, in training, scoring and
            generation alike. Saved as token ids. See :func:`from_chat_template`.
        intervention: loreft, direft, nodireft, noreft, consreft, lobireft or red.
        component: what to edit: a role such as "block_output", or a module path such as
            "model.layers.{layer}.mlp"; see :mod:`reft_kernels.model.components`.
        activation: linear, relu, gelu, gelu_tanh, silu, tanh or sigmoid.
        dropout: probability with which an entry of the edit is dropped in training.
        parametrization: of R: householder or cayley.
        init: "identity" (the model is unchanged at the start) or "orthogonal"; None: identity where
            the intervention has one.
        embed_dim: width of the component, where neither the model's configuration nor its weights
            tell it.
        modules_to_save: modules trained and saved in full besides, such as a classification head.

    Raises:
        ValueError, TypeError: a value out of range, naming the argument.
    """

    layers: str | list[int] = dataclasses.field(
        default="all", metadata={"help": '"all" or a list of layer numbers'}
    )
    rank: int = dataclasses.field(default=8, metadata={"help": "Rank of the edited subspace"})
    positions: str = dataclasses.field(
        default="f7+l7", metadata={"help": 'Tokens to edit, such as "f7+l7"'}
    )
    share_weights: bool = dataclasses.field(
        default=True, metadata={"help": "Same weights for first and last positions"}
    )
    pyreft_positions: bool = dataclasses.field(
        default=False, metadata={"help": "Count positions as pyreft's ReftDataset does"}
    )
    response_template: list | None = dataclasses.field(
        default=None, metadata={"help": "Token ids after whose last occurrence the response starts"}
    )
    intervention: str = dataclasses.field(
        default="loreft", metadata={"help": "Member of the family"}
    )
    component: str = dataclasses.field(
        default="block_output", metadata={"help": "Role or module path to edit"}
    )
    activation: str = dataclasses.field(
        default="linear", metadata={"help": "Activation of the learned projection"}
    )
    dropout: float = dataclasses.field(
        default=0.0, metadata={"help": "Dropout of the edit in training"}
    )
    parametrization: str = dataclasses.field(
        default="householder", metadata={"help": "householder or cayley"}
    )
    init: str | None = dataclasses.field(
        default="identity", metadata={"help": "identity or orthogonal"}
    )
    embed_dim: int | None = dataclasses.field(
        default=None, metadata={"help": "Width of the component, where unknown"}
    )
    modules_to_save: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Modules trained in full"}
    )

    # PEFT matches modules by name; this method finds its components itself
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES
    # set by from_pretrained: a file's weights are still to come
    awaits_weights: ClassVar[bool] = False
    folder: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REFT
        if self.layers != "all":
            self.layers = self._checked_layers()
        if not _is_count(self.rank) or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank: got {self.rank!r}, expected an integer from 1 to {MAX_RANK}")
        spec = positions_module.parse(self.positions)
        if not self.share_weights and not (spec.first and spec.last):
            raise ValueError(
                f"share_weights: got False with positions {self.positions!r}, expected positions "
                "'fN+lM'"
            )
        if not isinstance(self.pyreft_positions, bool):
            raise ValueError(
                f"pyreft_positions: got {self.pyreft_positions!r}, expected True or False"
            )
        if self.pyreft_positions:
            spec.as_pyreft()
        if self.response_template is not None:
            self.response_template = checked_template(self.response_template)
        _one_of("intervention", self.intervention, tuple(STACKED))
        if not isinstance(self.component, str) or not self.component:
            raise ValueError(f"component: got {self.component!r}, expected a role or a module path")
        self.activation = canonical_activation(self.activation)
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout!r}, expected a probability in [0, 1)")
        _one_of("parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.init is not None:
            _one_of("init", self.init, INITS)
        if self.embed_dim is not None and (not _is_count(self.embed_dim) or self.embed_dim < 1):
            raise ValueError(
                f"embed_dim: got {self.embed_dim!r}, expected a positive integer or None"
            )

    def _checked_layers(self) -> list[int]:
        layers = self.layers
        if isinstance(layers, range | tuple | set):
            layers = sorted(layers) if isinstance(layers, set) else list(layers)
        if (
            not isinstance(layers, list)
            or not layers
            or not all(_is_count(n) and n >= 0 for n in layers)
        ):
            raise ValueError(
                f"layers: got {self.layers!r}, expected 'all' or a list of layer numbers"
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers: got {self.layers!r}, expected each layer number once")
        return layers

    @property
    def spec(self) -> Spec:
        """The parsed ``positions``."""
        parsed = positions_module.parse(self.positions)
        return parsed.as_pyreft() if self.pyreft_positions else parsed

    @property
    def rule(self) -> PositionRule:
        """Which tokens are edited, as the engine has it."""
        template = self.response_template
        alternatives = None if template is None else tuple(tuple(ids) for ids in template)
        return PositionRule(self.spec, not self.share_weights, alternatives)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs
    ) -> ReftConfig:
        """As :meth:`peft.PeftConfig.from_pretrained`."""
        config = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        config.awaits_weights = True
        config.folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        return config

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As :meth:`peft.PeftConfig.save_pretrained`; the folder's model card says how to load
        the adapter.
        """
        super().save_pretrained(save_directory, **kwargs)
        saving.write_card(Path(save_directory), self)
