"""Configuration of a run: a frozen dataclass filled from a recipe, a YAML file and flags.

All values are checked before any model or data is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from reft_train.errors import UserError
from reft_train.recipes import recipe

REFT_METHODS = ("loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "red")
PEFT_METHODS = ("lora", "dora", "prefix", "ia3", "head")
METHODS = REFT_METHODS + PEFT_METHODS


def _field(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
):
    return field(
        default=default, metadata={"help": text, "choices": choices, "low": low, "high": high}
    )


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run.

    ``reft-train run --help`` describes every field. The flag of a field is its name with dashes.
    """

    model: str = _field("", "folder or hub name of the frozen model")
    task: str = _field("", "commonsense, math, gsm8k, instruct, boolq, glue/NAME, jsonl, ...")
    recipe: str | None = _field(None, "named settings to start from; none: the task's")
    data: str | None = _field(None, "folder of data files, as LLM-Adapters lays them out")
    train: str | None = _field(None, "training file: .json, .jsonl, .csv, .tsv or .parquet")
    test: list[str] = field(
        default_factory=list, metadata={"help": "test files; none: those in the data folder"}
    )
    output: str = _field("runs/run", "folder for adapter, checkpoints, log and report")
    resume: bool = _field(False, "go on from the last checkpoint in the output folder")
    overwrite: bool = _field(False, "replace a run that the output folder holds")

    method: str = _field("loreft", "what is trained", METHODS)
    rank: int = _field(8, "rank of the edits, or of LoRA", None, 1, 256)
    layers: str | list[int] = _field("all", "all, or numbers of the layers to edit, such as 0;2;4")
    positions: str = _field("f7+l7", "tokens to edit: f7+l7, f3, l1, prompt or all")
    share_weights: bool = _field(True, "same weights for first and last positions")
    component: str = _field("block_output", "what to edit: a role, or a module path with {layer}")
    activation: str = _field("linear", "activation of the learned projection")
    dropout: float = _field(0.0, "dropout of the edits, or of LoRA", None, 0.0, 0.99)
    parametrization: str = _field(
        "householder", "how R is kept orthonormal", ("householder", "cayley")
    )
    init: str = _field(
        "auto",
        "the edits' start; auto: the identity where there is one",
        ("auto", "identity", "orthogonal"),
    )
    lora_alpha: float | None = _field(
        None, "scale of LoRA and DoRA; none: twice the rank", None, 1e-6
    )
    lora_targets: list[str] = field(
        default_factory=list, metadata={"help": "modules of LoRA, DoRA, IA3; none: PEFT's choice"}
    )
    prefix_tokens: int = _field(20, "virtual tokens of prefix tuning", None, 1)

    architecture: str = _field(
        "auto", "how the model is used", ("auto", "causal", "seq2seq", "encoder")
    )
    pooling: str = _field(
        "model",
        "what a classifier reads: as the model's own does, or the mean of the last hidden states",
        ("model", "mean"),
    )
    dtype: str = _field(
        "auto",
        "of the frozen weights; auto: float32 on a CPU, bfloat16 on a GPU that has it",
        ("auto", "float32", "bfloat16", "float16"),
    )
    mixed_precision: str = _field("no", "autocast in training", ("no", "bf16", "fp16"))
    quantization: str = _field(
        "none", "of the frozen weights, by bitsandbytes", ("none", "8bit", "4bit")
    )
    device: str = _field("auto", "auto: cuda where there is one", ("auto", "cpu", "cuda"))
    device_map: str = _field(
        "none", "auto: spread the frozen model over all devices", ("none", "auto")
    )
    attention: str | None = _field(
        None, "attention implementation: eager, sdpa, flash_attention_2; none: the model's"
    )
    compile: bool = _field(False, "torch.compile the model")
    liger: bool = _field(False, "Liger kernels in the frozen model")
    gradient_checkpointing: bool = _field(False, "recompute layers in the backward")
    fsdp: bool = _field(False, "shard by torch FSDP2, under torchrun or accelerate launch")
    deepspeed: str | None = _field(None, "DeepSpeed configuration, as Trainer takes it")

    epochs: int = _field(3, "passes over the training rows", None, 1)
    max_steps: int | None = _field(None, "optimizer steps; replaces epochs", None, 1)
    batch_size: int = _field(16, "examples in a forward of one process", None, 1)
    accumulation: int = _field(2, "forwards in an optimizer step", None, 1)
    lr: float = _field(9e-4, "highest learning rate", None, 0.0)
    head_lr: float | None = _field(None, "of a classification head; none: lr", None, 0.0)
    weight_decay: float = _field(0.0, "decay of the trained weights", None, 0.0)
    warmup: float = _field(
        0.1, "part of the steps over which the learning rate rises", None, 0.0, 1.0
    )
    schedule: str = _field("linear", "of the learning rate", ("linear", "cosine", "constant"))
    max_grad_norm: float = _field(1.0, "clip gradients to this norm; 0: do not", None, 0.0)
    seed: int = _field(42, "of weights, data order and splits", None, 0, 2**31 - 1)

    max_length: int = _field(512, "tokens of an example, target included", None, 4)
    turns: str = _field(
        "all",
        "answers of a conversation that are trained: all, a row for each, or the last",
        ("all", "last"),
    )
    packing: bool = _field(False, "pack the examples of a batch into full rows, without padding")
    packed_length: int | None = _field(None, "tokens of a packed row; none: max_length", None, 4)
    group_by_length: bool = _field(True, "batches of similar length")
    streaming: bool = _field(
        False, "read and tokenize the training file while training; needs max_steps"
    )
    shuffle_buffer: int = _field(1000, "rows to shuffle among when streaming", None, 1)
    train_rows: int | None = _field(None, "use at most so many training rows", None, 1)
    test_rows: int | None = _field(None, "use at most so many rows of each test set", None, 1)
    validation: float = _field(
        0.0, "held-out training rows: a part below 1, or a number", None, 0.0
    )
    select: str = _field(
        "none", "keep the best checkpoint by held-out loss or metric", ("none", "loss", "metric")
    )
    evaluate_every: int | None = _field(
        None, "steps between evaluations of held-out rows; none: an epoch", None, 1
    )
    save_every: int | None = _field(
        None, "steps between checkpoints; none: an epoch, or a tenth of a streaming run", None, 1
    )
    keep: int = _field(2, "checkpoints to keep", None, 1)
    log_every: int = _field(10, "steps between lines of the log", None, 1)
    workers: int = _field(0, "processes that prepare batches", None, 0)
    threads: int | None = _field(None, "CPU threads; none: torch's choice", None, 1)
    cache: str | None = _field(None, "folder of tokenized data; none: the user's cache folder")

    skip_test: bool = _field(False, "do not score the test sets at the end")
    eval_batch_size: int = _field(32, "examples in a forward of evaluation", None, 1)
    max_new_tokens: int | None = _field(None, "tokens of an answer; none: the task's", None, 1)
    temperature: float = _field(0.0, "of sampling; 0: greedy", None, 0.0)
    top_p: float = _field(1.0, "nucleus of sampling", None, 1e-6, 1.0)
    num_beams: int = _field(1, "beams", None, 1)

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if not self.model:
            raise UserError("model: got none, expected a model's folder or hub name")
        if not self.task:
            raise UserError(
                "task: got none, expected a task such as commonsense, gsm8k, boolq or jsonl"
            )
        self._check_pairs()

    def _check_pairs(self) -> None:
        from reft_kernels.activations import canonical_activation
        from reft_kernels.positions import parse

        try:
            spec = parse(self.positions)
            canonical_activation(self.activation)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not self.share_weights and not (spec.first and spec.last):
            raise UserError(
                f"share_weights: got false with positions {self.positions!r}, expected positions "
                "'fN+lM'"
            )
        if self.streaming and self.max_steps is None:
            raise UserError(
                "max_steps: got none with streaming, expected a number: a stream has no length"
            )
        if self.streaming and self.validation:
            raise UserError(
                f"validation: got {self.validation:g} with streaming, expected 0: a stream cannot "
                "be split"
            )
        if self.validation >= 1 and self.validation != int(self.validation):
            raise UserError(
                f"validation: got {self.validation:g}, expected a part below 1 or a whole number "
                "of rows"
            )
        if self.select != "none" and not self.holds_out:
            raise UserError(
                f"select: got {self.select!r} without validation, expected held-out training rows "
                "to choose by"
            )
        if self.fsdp and self.deepspeed:
            raise UserError("fsdp: got true with deepspeed, expected one of them")
        if self.resume and self.overwrite:
            raise UserError("resume: got true with overwrite, expected one of them")

    @property
    def holds_out(self) -> bool:
        """Whether the run has held-out rows, from ``validation`` or from a GLUE task."""
        return bool(self.validation) or self.task.startswith("glue/")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name as plain values."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with the given changes, validated again."""
        known(changes, "setting")
        return dataclasses.replace(self, **changes)


FIELDS: Mapping[str, dataclasses.Field] = types.MappingProxyType(
    {f.name: f for f in dataclasses.fields(RunConfig)}
)
TYPES: Mapping[str, Any] = types.MappingProxyType(typing.get_type_hints(RunConfig))


def known(names: typing.Iterable[str], what: str) -> None:
    """Raise UserError for a name that is not a setting."""
    for name in names:
        if name not in FIELDS:
            near = get_close_matches(str(name), FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "reft-train run --help lists them"
            raise UserError(f"{what}: got {name!r}, which is none; {hint}")


def check(name: str, value: Any) -> Any:
    """Validate a setting's value and convert it to the field's type."""
    hint, about = TYPES[name], FIELDS[name].metadata
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    value = _converted(name, value, kinds)
    choices, low, high = about.get("choices"), about.get("low"), about.get("high")
    if choices is not None and value not in choices:
        raise UserError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        ends = (-math.inf if low is None else low), (math.inf if high is None else high)
        if not (math.isfinite(value) and ends[0] <= value <= ends[1]):
            limits = f">= {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise UserError(f"{name}: got {value!r}, expected a number {limits}")
    return value


def _converted(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    inner = next((typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is list), None)
    expected = {int: "a whole number", str: "text", float: "a number", bool: "true or false"}.get(
        kinds[0], "a list"
    )
    if bool in kinds or isinstance(value, bool):
        if bool in kinds and isinstance(value, bool):
            return value
    elif int in kinds and isinstance(value, int):
        return value
    elif float in kinds:
        with contextlib.suppress(TypeError, ValueError):
            return float(value)  # YAML parses 9e-4 as a string
    elif inner and isinstance(value, list | tuple):
        if all(type(item) is inner for item in value):
            return list(value)
        value, expected = list(value), f"a list of {'numbers' if inner is int else 'names'}"
    elif str in kinds and isinstance(value, str):
        if name != "layers" or value == "all":
            return value
        expected = "'all' or a list of layer numbers"
    raise UserError(f"{name}: got {value!r}, expected {expected}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file with one mapping of :class:`RunConfig` field names."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(
            f"--config: got {path}, which cannot be read ({reason}), expected a YAML file"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--config: got {path}, which is not YAML ({reason}), expected a mapping of settings"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"--config: got {path} with a {type(values).__name__}, expected a mapping of settings"
        )
    known(values, f"setting in {path}")
    return values


def build(*layers: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from mappings; later ones override earlier ones and the recipe."""
    from reft_train import tasks

    merged: dict[str, Any] = {}
    for values in layers:
        known(values, "setting")
        merged.update(values)
    if not isinstance(merged.get("task"), str) or not merged["task"]:
        raise UserError(
            "task: got none, expected a task such as commonsense, gsm8k, boolq or jsonl"
        )
    name = check("recipe", merged.get("recipe")) or tasks.get(merged["task"]).recipe
    return RunConfig(**{**recipe(name), **merged, "recipe": name})


def dump_yaml(config: RunConfig) -> str:
    """Format the settings as YAML that :func:`read_yaml` can read."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
