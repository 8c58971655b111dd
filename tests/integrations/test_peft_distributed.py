"""Two processes on gloo: gradients under DDP and FSDP2 equal those of one process over the same examples."""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import multiprocessing

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, make, shake, stacks

pytestmark = pytest.mark.slow
CASES = [("ddp", None), ("ddp", False), ("ddp", True), ("fsdp2", None), ("fsdp2", False)]


def _build(intervention):
    model = get_peft_model(make("llama"), ReftConfig(rank=4, intervention=intervention, init="orthogonal"))
    shake(model)
    return model.train()


def _shard(model, stack):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    fully_shard(stack, mesh=mesh)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _work(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    inputs = batch("llama")
    for intervention in ("loreft", "nodireft"):
        whole = _build(intervention)
        for row in range(2):
            (whole(**{k: v[row : row + 1] for k, v in inputs.items()}).loss / 2).backward()
        expected = {n: p.grad for n, p in stacks(whole)[0].named_parameters()}
        for engine, reentrant in CASES:
            model = _build(intervention)
            (stack,) = stacks(model)
            if reentrant is not None:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.enable_input_require_grads()
            wrapped = torch.nn.parallel.DistributedDataParallel(model) if engine == "ddp" else _shard(model, stack)
            wrapped(**{k: v[rank : rank + 1] for k, v in inputs.items()}).loss.backward()
            for name, parameter in stack.named_parameters():
                grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                torch.testing.assert_close(grad, expected[name], msg=lambda m: f"{engine} {reentrant} {name}: {m}")  # noqa: B023
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_work, (port,), nprocs=2)
