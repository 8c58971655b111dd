"""FSDP2 for models with edits: engine settings, wrapped modules, and gathered state."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reft_kernels.interventions import Intervention
from reft_train.config import RunConfig
from reft_train.errors import wrong

# as TrainingArguments takes them, and upper-cased with a prefix as accelerate reads them
_SETTINGS = {
    "version": 2,
    "state_dict_type": "FULL_STATE_DICT",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": False,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}


def requested(config: RunConfig) -> bool:
    """Whether to shard a run, by its settings or by ``accelerate launch --use_fsdp``."""
    return config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def engine_environment(config: RunConfig) -> AbstractContextManager:
    """Set the environment variables read by engines; all variables are restored on exit."""
    settings = _SETTINGS if requested(config) else {}
    variables = {f"FSDP_{name.upper()}": str(value) for name, value in settings.items()}
    return mock.patch.dict(os.environ, variables)


def _block_classes(model: Any) -> list[str]:
    """Return the module classes to wrap.

    Excludes modules around the embedding, which accelerate wraps.
    """
    modules, embedding = list(model.modules()), model.get_input_embeddings()
    declared = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    around = {type(m).__name__ for m in modules if embedding in set(m.modules())}
    return sorted(declared & {type(m).__name__ for m in modules} - around)


def _tied_elsewhere(model: Any) -> bool:
    """Whether a parameter is shared by modules other than embedding and output layer.

    accelerate keeps those two together.
    """
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    shared = (module for group in owners.values() if len(group) > 1 for module in group)
    return any(all(module is not part for part in pair) for module in shared)


def fsdp_arguments(config: RunConfig, model: Any) -> dict[str, Any]:
    """Return the TrainingArguments for FSDP2; raise UserError for unsupported settings."""
    if not requested(config):
        return {}
    base = model.get_base_model()
    blocks, name = _block_classes(base), type(base).__name__
    single = int(os.environ.get("WORLD_SIZE", "1")) < 2
    for fails, what, expected in (
        (single, "in a single process", "torchrun or accelerate launch with several"),
        (not blocks, f"with {name}, whose blocks transformers does not name", "false"),
        (config.method == "prefix", "with method prefix, which PEFT cannot save", "another method"),
        (_tied_elsewhere(base), f"with {name}, which ties more than its embeddings", "false"),
    ):
        if fails:
            raise wrong("fsdp", f"true {what}", expected)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(blocks)
    return {"fsdp": True, "fsdp_config": {**_SETTINGS, "transformer_layer_cls_to_wrap": blocks}}


def shard_on_cpus(accelerator: Any, arguments: Any) -> None:
    """Make accelerate use FSDP2 on CPUs, where it would otherwise use DDP without a warning."""
    plugin = FullyShardedDataParallelPlugin(**(getattr(arguments, "fsdp_plugin_args", None) or {}))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def shard_stacks(model: nn.Module) -> None:
    """Shard every stack of edits as a separate unit, before the rest of ``model``.

    A stack builds the weights of all layers in one call and receives gradients after the whole
    backward, so it cannot belong to a layer's unit. It computes in float32: R built from rounded
    parameters is not orthonormal.
    """
    # edits read a stack's outputs and never write to them
    text = "FSDP2-wrapped module .* returned a view tensor"
    warnings.filterwarnings("ignore", message=text, category=UserWarning)
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for stack in list(model.modules()):
        if isinstance(stack, Intervention) and not isinstance(stack, fsdp.FSDPModule):
            fsdp.fully_shard(stack, mp_policy=policy)


def gather_to_generate(model: nn.Module) -> None:
    """Make ``generate`` of a sharded model gather weights as its forward does.

    transformers 4 does not do this.
    """
    if (
        isinstance(model, fsdp.FSDPModule)
        and hasattr(model, "generate")
        and "generate" not in vars(model)
    ):
        fsdp.register_fsdp_forward_method(model, "generate")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Gather a sharded model's trained parameters and buffers on the CPU of the first process.

    This is a collective operation.
    """
    options = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}
    return get_model_state_dict(model, options=StateDictOptions(**options))
