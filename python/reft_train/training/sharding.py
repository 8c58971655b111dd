"""What FSDP2 needs to know of edits: each stack is a unit of its own, in float32."""

from __future__ import annotations

import torch
from torch import nn

from reft_kernels.interventions import Intervention


def shard_stacks(model: nn.Module) -> None:
    """Shard every stack of edits as a unit of its own, before the rest of ``model`` is.

    A stack's call builds the weights for all layers, and gradients come back to it after the whole backward, so it can be
    gathered with no layer. Its unit computes in float32 whatever the rest does: R built from rounded parameters is not
    orthonormal. What is sharded already stays as it is.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for stack in model.modules():
        if isinstance(stack, Intervention) and not isinstance(stack, FSDPModule):
            fully_shard(stack, mp_policy=policy)


def forget_built(model: nn.Module) -> None:
    """Have stacks build their weights anew: loading into shards leaves no trace in what a stack compares."""
    for stack in model.modules():
        if isinstance(stack, Intervention):
            stack.train(stack.training)
