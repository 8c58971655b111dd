"""``ReftConfig``, the PEFT configuration of a ReFT adapter."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils.constants import CONFIG_NAME, DUMMY_TARGET_MODULES

from reft_kernels import base_model
from reft_kernels import positions as positions_module
from reft_kernels.activations import canonical_activation
from reft_kernels.integrations.peft import atomic, saving
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
    """Configuration of a ReFT adapter.

    LoReFT edits the hidden states h of chosen tokens and layers to h + R^T (W h + b - R h); the
    other interventions are variants of this formula.

    Args:
        layers: "all" or a list of layer numbers.
        rank: r, 1 to 256.
        positions: tokens to edit: "f7+l7" (first 7 and last 7 tokens of the prompt), "f3", "l1",
            "prompt" or "all"; with "text:", "image:", "video:" or "audio:" before it, of the
            tokens of that modality alone (:mod:`reft_kernels.positions`).
        share_weights: False for separate weights at first and last positions ("fN+lM" only).
        pyreft_positions: count first and last tokens like pyreft's ReftDataset classes: without
            the last token of the prompt, and at most half of the others each. The paper's script
            counts the last token, which is the default here.
        response_template: the text right before a response, such as the assistant header of a chat
            template: token ids, a list of alternatives (token ids each), or ``(text, tokenizer)``.
            A prompt ends after the last occurrence, in training, scoring and generation. Saved as
            token ids. See :func:`from_chat_template`.
        intervention: loreft, direft, nodireft, noreft, consreft, lobireft or red.
        component: a role such as "block_output", or a module path such as
            "model.layers.{layer}.mlp"; see :mod:`reft_kernels.model.components`.
        activation: linear, relu, gelu, gelu_tanh, silu, tanh or sigmoid.
        dropout: dropout probability for the entries of the edit in training.
        parametrization: parametrization of R: householder or cayley.
        init: "identity" (the edit is zero at initialization) or "orthogonal"; None: "identity" if
            the intervention supports it.
        embed_dim: width of the component; needed only if neither the model's configuration nor its
            weights determine it.
        modules_to_save: further modules that are trained and saved in full, such as a
            classification head.
        base_fingerprint: set when the adapter is attached to a model: its architecture, which
            loading and serving compare with theirs; see :mod:`reft_kernels.base_model`.
        save_id: set when the adapter is saved; see :mod:`reft_kernels.integrations.peft.atomic`.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of a wrong type.
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
    base_fingerprint: dict | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata={"help": "Architecture of the base model"}
    )
    save_id: str | None = dataclasses.field(
        default=None,
        repr=False,
        compare=False,
        metadata={"help": "Id of the save that wrote the configuration and its weights"},
    )

    # PEFT requires this attribute, but this method resolves its components without it
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES

    def __post_init__(self) -> None:
        super().__post_init__()
        # not dataclass fields, so that they are not saved; from_pretrained sets them
        self.awaits_weights = False  # weights from a file will be loaded next
        self.folder: str | None = None  # the folder of the file
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
        if self.base_fingerprint is not None:
            base_model.from_json(self.base_fingerprint)
        if self.embed_dim is not None and (not _is_count(self.embed_dim) or self.embed_dim < 1):
            raise ValueError(
                f"embed_dim: got {self.embed_dim!r}, expected a positive integer or None"
            )

    def _checked_layers(self) -> list[int]:
        layers: object = self.layers
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
        """The edited positions, in the form that :mod:`reft_kernels.model` uses."""
        template = self.response_template
        alternatives = None if template is None else tuple(tuple(ids) for ids in template)
        return PositionRule(self.spec, not self.share_weights, alternatives)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> ReftConfig:
        """Load a configuration; see :meth:`peft.PeftConfig.from_pretrained`.

        If a save to a local folder was interrupted between weights and configuration, uses the
        configuration in the weights' metadata and gives a warning.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        config = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        saved_with_weights = atomic.interrupted_config(Path(folder))
        if saved_with_weights is not None:
            warnings.warn(
                f"{folder}: a save was interrupted before it replaced {CONFIG_NAME}; using the "
                "configuration in the weights' metadata instead",
                stacklevel=2,
            )
            with tempfile.TemporaryDirectory() as temporary:
                text = json.dumps(saved_with_weights)
                (Path(temporary) / CONFIG_NAME).write_text(text, encoding="utf-8")
                config = super().from_pretrained(temporary, **kwargs)
        config.awaits_weights = True
        config.folder = folder
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save a configuration; see :meth:`peft.PeftConfig.save_pretrained`.

        Also adds a section to the folder's model card that explains how to load the adapter.
        """
        super().save_pretrained(save_directory, **kwargs)
        saving.write_card(Path(save_directory), self)
