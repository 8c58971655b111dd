"""Settings of a run, filled from a recipe, a YAML file and flags, and validated by pydantic.

All values are checked before any model or data is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from reft_train import tasks
from reft_train.errors import UserError, one_line, wrong
from reft_train.recipes import recipe

REFT_METHODS = ("loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "red")
PEFT_METHODS = ("lora", "dora", "prefix", "ia3", "head")
METHODS = REFT_METHODS + PEFT_METHODS
Kind = TypeVar("Kind", bound="Settings")


def setting(default: Any, text: str, **limits: Any) -> Any:
    """Return a field with its default, the help text of its flag, and limits of its value."""
    return Field(default, description=text, **limits)


def _layers(value: Any) -> Any:
    if value == "all":
        return value
    try:
        numbers = re.split("[;,]", value) if isinstance(value, str) else value
        numbers = sorted(int(number) for number in numbers)
    except (TypeError, ValueError):
        numbers = [-1]
    if numbers[:1] == [-1] or len(set(numbers)) < len(numbers) or min(numbers, default=0) < 0:
        raise wrong("layers", repr(value), "'all' or layer numbers such as 0;2;4, each once")
    return numbers


class Settings(BaseModel):
    """Base class of settings and of commands' options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Bookkeeping(Settings):
    """Settings that do not change what is trained."""

    output: str = setting("runs/run", "folder for adapter, checkpoints, log and report")
    resume: bool = setting(False, "resume from the last checkpoint in the output folder")
    overwrite: bool = setting(False, "replace the run in the output folder")
    log_every: int = setting(10, "steps between log entries", ge=1)
    keep: int = setting(2, "checkpoints to keep", ge=1)
    workers: int = setting(0, "processes that prepare batches", ge=0)
    threads: int | None = setting(None, "CPU threads; none: torch's choice", ge=1)
    cache: str | None = setting(None, "folder of tokenized data; none: the user's cache folder")


class Data(Settings):
    """Settings of the data."""

    task: str = setting("", "commonsense, math, gsm8k, instruct, boolq, glue/NAME, jsonl, ...")
    recipe: str | None = setting(None, "named settings to start from; none: the task's")
    data: str | None = setting(None, "folder of data files, as LLM-Adapters lays them out")
    train: str | None = setting(None, "training file: .json, .jsonl, .csv, .tsv or .parquet")
    max_length: int = setting(512, "tokens of an example, target included", ge=4)
    turns: Literal["all", "last"] = setting("all", "trained answers of a conversation")
    packing: bool = setting(False, "pack the examples of a batch into full rows, without padding")
    packed_length: int | None = setting(None, "tokens of a packed row; none: max_length", ge=4)
    group_by_length: bool = setting(True, "batches of similar length")
    streaming: bool = setting(False, "read and tokenize while training; needs max_steps")
    shuffle_buffer: int = setting(1000, "rows to shuffle among when streaming", ge=1)
    train_rows: int | None = setting(None, "use at most so many training rows", ge=1)
    validation: float = setting(0.0, "held-out training rows: a part below 1, or a number", ge=0)
    select: Literal["none", "loss", "metric"] = setting("none", "keep the best by held-out rows")
    evaluate_every: int | None = setting(None, "steps between evaluations; none: an epoch", ge=1)
    save_every: int | None = setting(None, "steps between checkpoints; none: an epoch", ge=1)


class Method(Settings):
    """Settings of the method that is trained."""

    method: Literal[METHODS] = setting("loreft", "what is trained")  # type: ignore[valid-type]
    rank: int = setting(8, "rank of the edits, or of LoRA", ge=1, le=256)
    layers: Annotated[str | list[int], BeforeValidator(_layers)] = setting(
        "all", "all, or numbers of the layers to edit, such as 0;2;4"
    )
    positions: str = setting("f7+l7", "tokens to edit: f7+l7, f3, l1, prompt or all")
    share_weights: bool = setting(True, "same weights for first and last positions")
    component: str = setting("block_output", "what to edit: a role, or a module path with {layer}")
    activation: str = setting("linear", "activation of the learned projection")
    dropout: float = setting(0.0, "dropout of the edits, or of LoRA", ge=0, le=0.99)
    parametrization: Literal["householder", "cayley"] = setting("householder", "map that builds R")
    init: Literal["auto", "identity", "orthogonal"] = setting("auto", "initial edits")
    lora_alpha: float | None = setting(
        None, "scale of LoRA and DoRA; none: twice the rank", ge=1e-6
    )
    lora_targets: list[str] = setting([], "modules of LoRA, DoRA, IA3; none: PEFT's choice")
    prefix_tokens: int = setting(20, "virtual tokens of prefix tuning", ge=1)


class Frozen(Settings):
    """Settings of the frozen model."""

    model: str = setting("", "folder or hub name of the frozen model")
    architecture: Literal["auto", "causal", "seq2seq", "encoder"] = setting("auto", "kind of model")
    pooling: Literal["model", "mean"] = setting("model", "classifier input: model's or mean")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the frozen weights; auto: float32 on a CPU, bfloat16 on a GPU that has it"
    )
    quantization: Literal["none", "8bit", "4bit"] = setting("none", "by bitsandbytes")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if available")
    device_map: Literal["none", "auto"] = setting("none", "auto: model over all devices")
    attention: str | None = setting(None, "eager, sdpa, flash_attention_2; none: the model's")
    liger: bool = setting(False, "Liger kernels in the frozen model")


class Optimization(Settings):
    """Settings of the optimizer."""

    lr: float = setting(9e-4, "highest learning rate", ge=0)
    head_lr: float | None = setting(None, "of a classification head; none: lr", ge=0)
    weight_decay: float = setting(0.0, "decay of the trained weights", ge=0)
    warmup: float = setting(0.1, "part of the steps in which the learning rate rises", ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "of the learning rate")
    max_grad_norm: float = setting(1.0, "clip gradients to this norm; 0: do not", ge=0)
    epochs: int = setting(3, "passes over the training rows", ge=1)
    max_steps: int | None = setting(None, "optimizer steps; replaces epochs", ge=1)
    batch_size: int = setting(16, "examples in a forward of one process", ge=1)
    accumulation: int = setting(2, "forwards in an optimizer step", ge=1)


class Engine(Settings):
    """Settings of the training engine."""

    seed: int = setting(42, "of weights, data order and splits", ge=0, lt=2**31)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "autocast in training")
    compile: bool = setting(False, "torch.compile the model")
    gradient_checkpointing: bool = setting(False, "recompute layers in the backward")
    prefix_cache: float = setting(0.0, "GB of unchanging states kept across steps; 0: none", ge=0)
    fsdp: bool = setting(False, "shard by torch FSDP2, under torchrun or accelerate launch")
    deepspeed: str | None = setting(None, "DeepSpeed configuration, as Trainer takes it")


class Scoring(Settings):
    """Settings of the evaluation on test sets."""

    skip_test: bool = setting(False, "do not score the test sets at the end")
    test: list[str] = setting([], "test files; none: those in the data folder")
    test_rows: int | None = setting(None, "use at most so many rows of each test set", ge=1)
    eval_batch_size: int = setting(32, "examples in a forward of evaluation", ge=1)
    max_new_tokens: int | None = setting(None, "tokens of an answer; none: the task's", ge=1)
    temperature: float = setting(0.0, "of sampling; 0: greedy", ge=0)
    top_p: float = setting(1.0, "nucleus of sampling", ge=1e-6, le=1)
    num_beams: int = setting(1, "beams", ge=1)


class RunConfig(Scoring, Bookkeeping, Engine, Optimization, Method, Data, Frozen):
    """Settings of a run, as ``reft-train run --help`` lists them."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        from reft_kernels.activations import canonical_activation
        from reft_kernels.positions import parse

        spec, held = parse(self.positions), self.validation
        canonical_activation(self.activation)
        apart = not self.share_weights and not (spec.first and spec.last)
        positions, streamed = f"false with positions {self.positions!r}", f"{held:g} with streaming"
        endless, fraction = self.streaming and self.max_steps is None, held >= 1 and held % 1
        blind, unseen = self.select != "none" and not self.holds_out, f"{self.select!r} alone"
        other = "" if self.method in REFT_METHODS else f"method {self.method}"
        switches = ("packing", "compile", "fsdp", "deepspeed")
        cacheless = other or next((name for name in switches if getattr(self, name)), "")
        uncached = f"{self.prefix_cache:g} with {cacheless}"
        for fails, name, got, expected in (
            (not self.model, "model", "none", "a model's folder or hub name"),
            (not self.task, "task", "none", "a task such as commonsense, boolq or jsonl"),
            (apart, "share_weights", positions, "positions 'fN+lM'"),
            (endless, "max_steps", "none with streaming", "a number: a stream has no length"),
            (self.streaming and held, "validation", streamed, "0: a stream cannot be split"),
            (fraction, "validation", f"{held:g}", "a part below 1 or a whole number of rows"),
            (blind, "select", unseen, "held-out training rows, such as --validation 0.1"),
            (self.fsdp and self.deepspeed, "fsdp", "true with deepspeed", "one of them"),
            (self.prefix_cache and cacheless, "prefix_cache", uncached, "0"),
            (self.resume and self.overwrite, "resume", "true with overwrite", "one of them"),
        ):
            if fails:
                raise wrong(name, got, expected)
        return self

    @property
    def holds_out(self) -> bool:
        """Whether the run has held-out rows, from ``validation`` or from a GLUE task."""
        return bool(self.validation) or self.task.startswith("glue/")

    def replace(self, **changes: Any) -> RunConfig:
        """Return a copy with the given changes, validated again."""
        return validated(RunConfig, {**self.model_dump(), **changes})


FIELDS = RunConfig.model_fields


def validated(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Build settings or options; the first invalid value is reported in a UserError."""
    try:
        return kind(**values)
    except ValidationError as failure:
        error = failure.errors()[0]
    reason = error["msg"].removeprefix("Value error, ")
    if not error["loc"] or error["type"] == "value_error":
        raise UserError(reason)
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        raise unknown(name)
    raise wrong(name, repr(error["input"]), reason.removeprefix("Input should be "))


def check(name: str, value: Any) -> Any:
    """Validate the value of one setting and convert it to the field's type."""
    least = {"model": "none", "task": "none", "validation": 0.1, "max_steps": 1}
    return getattr(validated(RunConfig, {**least, name: value}), name)


def unknown(name: object, where: str = "") -> UserError:
    """Build the error for a name that is not a setting."""
    near = get_close_matches(str(name), FIELDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "reft-train run --help lists the settings"
    return UserError(f"{where}unknown setting {name!r}; {hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file with one mapping of :class:`RunConfig` field names."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        what = f"{path}, which cannot be read ({reason})"
        raise wrong("--config", what, "a YAML file") from None
    if not isinstance(values, dict):
        what = f"{path} with a {type(values).__name__}"
        raise wrong("--config", what, "a mapping of settings")
    for name in values:
        if name not in FIELDS:
            raise unknown(name, f"{path}: ")
    return values


def build(*layers: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from mappings; later ones override earlier ones and the recipe."""
    merged = {name: value for values in layers for name, value in values.items()}
    if not isinstance(merged.get("task"), str) or not merged["task"]:
        raise wrong("task", "none", "a task such as commonsense, gsm8k, boolq or jsonl")
    name = merged.get("recipe") or tasks.get(merged["task"]).recipe
    return validated(RunConfig, {**recipe(str(name)), **merged, "recipe": name})


def dump_yaml(config: RunConfig) -> str:
    """Format the settings as YAML that :func:`read_yaml` can read."""
    import yaml

    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
