"""DDP and FSDP2 with two gloo processes: gradients equal those of one process."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import multiprocessing

from reft_kernels.integrations.peft import ReftConfig, share_build
from tests.model.families import batch, make, shake, stacks

pytestmark = pytest.mark.slow
CASES = [("ddp", None), ("ddp", False), ("ddp", True), ("fsdp2", None), ("fsdp2", False)]
MICRO = 2


def _build(intervention, **kwargs):
    model = get_peft_model(
        make("llama"), ReftConfig(rank=4, intervention=intervention, init="orthogonal", **kwargs)
    )
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


def _wrap(engine, model, reentrant):
    if reentrant is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
    return (
        torch.nn.parallel.DistributedDataParallel(model)
        if engine == "ddp"
        else _shard(model, stacks(model)[0])
    )


def _compare(model, expected, case) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = (
                parameter.grad.full_tensor()
                if hasattr(parameter.grad, "full_tensor")
                else parameter.grad
            )
            torch.testing.assert_close(grad, expected[name], msg=lambda m: f"{case} {name}: {m}")  # noqa: B023


def _gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _at_once(rank: int) -> None:
    inputs = batch("llama")
    for intervention in ("loreft", "nodireft"):
        whole = _build(intervention)
        for row in range(2):
            (whole(**{k: v[row : row + 1] for k, v in inputs.items()}).loss / 2).backward()
        for engine, reentrant in CASES:
            model = _build(intervention)
            wrapped = _wrap(engine, model, reentrant)
            wrapped(**{k: v[rank : rank + 1] for k, v in inputs.items()}).loss.backward()
            _compare(model, _gradients(whole), (intervention, engine, reentrant))


@contextlib.contextmanager
def _micro_step(wrapped, engine, last):
    """Only the last micro-step of a step reduces gradients."""
    if engine == "fsdp2":
        wrapped.set_requires_gradient_sync(last)
        yield
    else:
        with contextlib.nullcontext() if last else wrapped.no_sync():
            yield


def _accumulated(rank: int) -> None:
    """Two steps with accumulation, because stale state of an engine would affect the second.

    The head receives its gradient in the main backward.
    """
    batches = [batch("llama", seed=seed) for seed in range(MICRO)]
    whole = _build("loreft", modules_to_save=["lm_head"])
    for inputs in batches:
        for row in range(2):
            (
                whole(**{k: v[row : row + 1] for k, v in inputs.items()}).loss / (2 * MICRO)
            ).backward()
    for engine, reentrant in CASES:
        model = _build("loreft", modules_to_save=["lm_head"])
        (stack,) = stacks(model)
        wrapped = _wrap(engine, model, reentrant)
        with share_build(wrapped) as shared:
            for _ in range(2):
                for number, inputs in enumerate(batches, 1):
                    with _micro_step(wrapped, engine, number == MICRO):
                        (
                            wrapped(**{k: v[rank : rank + 1] for k, v in inputs.items()}).loss
                            / MICRO
                        ).backward()
                assert all(p.grad is None for p in stack.parameters())
                shared.flush()
                _compare(model, _gradients(whole), ("accumulated", engine, reentrant))
                model.zero_grad()


def _forgotten(rank: int) -> None:
    """The optimizer has the shards of a sharded stack, not the gathered parameters."""
    inputs = {k: v[rank : rank + 1] for k, v in batch("llama").items()}
    for engine in ("ddp", "fsdp2"):
        model = _build("loreft")
        (stack,) = stacks(model)
        wrapped = _wrap(engine, model, None)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with share_build(wrapped) as shared:
            wrapped(**inputs).loss.backward()
            with pytest.raises(RuntimeError, match="the optimizer steps while gradients"):
                optimizer.step()
            shared.flush()
            optimizer.step()
            wrapped(**inputs).loss.backward()
            with torch.no_grad():
                stack.W.add_(0.1)
            with pytest.raises(RuntimeError, match="parameters were changed"):
                shared.flush()
            shared.discard()


def _refused(rank: int) -> None:
    inputs = {k: v[rank : rank + 1] for k, v in batch("llama").items()}
    for option in ("find_unused_parameters", "static_graph"):
        wrapped = torch.nn.parallel.DistributedDataParallel(_build("loreft"), **{option: True})
        with (
            share_build(wrapped),
            pytest.raises(RuntimeError, match=f"{option}: got True, expected False"),
        ):
            wrapped(**inputs)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole_unit = fully_shard(_build("loreft"), mesh=init_device_mesh("cpu", (2,)))
    with share_build(whole_unit) as shared:
        whole_unit(**inputs).loss.backward()
        with pytest.raises(RuntimeError, match="fully_shard the stack as a unit of its own"):
            shared.flush()
        shared.discard()


def _work(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for check in (_at_once, _accumulated, _forgotten, _refused):
        check(rank)
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process():
    """All checks run in one pair of processes, because starting processes is slow."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_work, (port,), nprocs=2)
