"""Cost of a training step: LoReFT here, in plain PyTorch and by pyreft, and LoRA, in one process.

All methods share the frozen weights and a batch of random tokens. The three of LoReFT edit the
same tokens and start from the same R, W and b, so that their first losses agree.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from reft_train.memory import PeakMeter
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from reft_kernels import positions
from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.interventions import StackedLoReFT

BATCH, LENGTH, PROMPT = 4, 64, 40
TOLERANCE = 0.05  # of losses that must agree, relative to what the edits change


class PlainLoReFT(nn.Module):
    """h + Rᵀ(W h + b - R h) on some columns of a block's output, as a forward hook.

    R has PyTorch's own orthogonal parametrization.
    """

    def __init__(self, columns: Tensor, R: Tensor, W: Tensor, b: Tensor) -> None:
        super().__init__()
        self.rotate = orthogonal(nn.Linear(R.shape[1], R.shape[0], bias=False).to(R.device))
        self.rotate.weight, self.columns = R, columns
        self.W, self.b = nn.Parameter(W.clone()), nn.Parameter(b.clone())

    def forward(self, block: nn.Module, inputs: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        h, R, edited = hidden[:, self.columns].float(), self.rotate.weight, hidden.clone()
        edit = h + (h @ self.W.T + self.b - h @ R.T) @ R
        edited[:, self.columns] = edit.to(hidden.dtype)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


Built = tuple[Callable[[], Tensor], Any]  # the loss and the trained parameters


def _frozen(model: Any, at: SimpleNamespace) -> Built:
    # forward, and backward to the embeddings, which every method needs
    embed, batch = model.get_input_embeddings(), dict(at.batch)
    ids = batch.pop("input_ids")
    return lambda: model(inputs_embeds=embed(ids).requires_grad_(), **batch).loss, ()


@torch.no_grad()
def _engine(model: Any, at: SimpleNamespace) -> Built:
    model = get_peft_model(model, copy.copy(at.config))
    (stack,) = (module for module in model.modules() if isinstance(module, StackedLoReFT))
    stack.set_R(at.R)
    stack.W.copy_(at.W)
    stack.b.copy_(at.b)
    return lambda: model(**at.batch).loss, stack.parameters()


def _plain(model: Any, at: SimpleNamespace) -> Built:
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = next(blocks for blocks in lists if len(blocks) == at.depth)
    edits = nn.ModuleList(
        PlainLoReFT(at.columns, *own) for own in zip(at.R, at.W, at.b, strict=True)
    )
    for layer, edit in zip(at.layers, edits, strict=True):
        blocks[layer].register_forward_hook(edit)
    return lambda: model(**at.batch).loss, edits.parameters()


def _pyreft(model: Any, at: SimpleNamespace) -> Built:
    import pyreft

    size = {"embed_dim": at.R.shape[2], "low_rank_dimension": at.R.shape[1], "dtype": model.dtype}
    edits = [pyreft.LoreftIntervention(**size).to(at.R.device) for _ in at.layers]
    with torch.no_grad():
        for edit, R, W, b in zip(edits, at.R, at.W, at.b, strict=True):
            edit.rotate_layer.weight = R.T
            edit.learned_source.weight.copy_(W)
            edit.learned_source.bias.copy_(b)
    where = [
        {"layer": layer, "component": "block_output", "intervention": edit}
        for layer, edit in zip(at.layers, edits, strict=True)
    ]
    config = pyreft.ReftConfig(representations=where)
    reft_model = pyreft.get_reft_model(model, config, set_device=False)
    reft_model.set_device(model.device)
    inputs = {name: tensor for name, tensor in at.batch.items() if name != "labels"}
    units = {"sources->base": (None, [[at.columns.tolist()] * BATCH] * len(edits))}

    def loss() -> Tensor:
        return reft_model(inputs, unit_locations=units, labels=at.batch["labels"])[1].loss

    return loss, reft_model.get_trainable_parameters()


def _lora(model: Any, at: SimpleNamespace) -> Built:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return lambda: model(**at.batch).loss, (p for p in model.parameters() if p.requires_grad)


FROZEN, OURS = "frozen model", "LoReFT, reft_kernels"
METHODS = {
    FROZEN: _frozen,
    OURS: _engine,
    "LoReFT, plain PyTorch": _plain,
    "LoReFT, pyreft": _pyreft,
    "LoRA r=8 on all linear layers, PEFT": _lora,
}


def _problem(model: Any, config: ReftConfig) -> SimpleNamespace:
    """Return what all methods get: batch, layers, columns to edit, and R, W and b of each layer."""
    settings, draw = model.config.get_text_config(), torch.Generator().manual_seed(0)
    depth, d = settings.num_hidden_layers, settings.hidden_size
    layers = list(range(depth)) if config.layers == "all" else sorted(config.layers)
    config = copy.copy(config)
    config.inference_mode = False  # as the configuration of a saved adapter is
    config.response_template = None  # random tokens have none; the labels tell where prompts end
    rows = positions.resolve(config.positions, [PROMPT], LENGTH).long()
    R = torch.linalg.qr(torch.randn(len(layers), d, config.rank, generator=draw)).Q.mT
    # W = R would edit nothing; large edits change the loss by more than bfloat16 rounds it
    W = R + 8 * torch.randn(R.shape, generator=draw) / d**0.5
    b = torch.randn(R.shape[:2], generator=draw)
    ids = torch.randint(settings.vocab_size, (BATCH, LENGTH), generator=draw)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    tensors = {"R": R.contiguous(), "W": W, "b": b, "columns": rows[rows >= 0]}
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return SimpleNamespace(config=config, depth=depth, layers=layers, batch=batch, **tensors)


def _stepper(build: Callable, model: Any, at: SimpleNamespace) -> tuple[Callable, int]:
    frozen = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    loss_of, trained = build(copy.deepcopy(model, frozen).train(), at)
    trained = list(trained)
    # pyreft's R turns into zeros under weight decay, so no method has any
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0) if trained else None

    def step() -> float:
        (loss := loss_of()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step, sum(parameter.numel() for parameter in trained)


def measure(model: Any, config: ReftConfig, rounds: int) -> dict[str, dict[str, Any]]:
    """Measure a training step of each method on a frozen model that has no adapter, in turn.

    Returns:
        for each method: trained numbers, the first loss, peak memory above the weights in MiB, and
        the median of its time over the frozen model's; or ``missing``, a reason.

    Raises:
        RuntimeError: If losses that must agree do not.
    """
    found: dict[str, dict[str, Any]] = {}
    steps, at = {}, _problem(model, config)
    # before memory is measured; importing it prints a message
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("pyreft")
    _stepper(_frozen, model, at)[0]()  # the very first step loads libraries
    for title, build in METHODS.items():
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # of glibc: gives freed memory back
            ctypes.CDLL(None).malloc_trim(0)
        meter = PeakMeter(model.device)
        meter.start()
        try:
            steps[title], trained = _stepper(build, model, at)
        except ImportError as error:
            found[title] = {"missing": f"not installed ({error})"}
            continue
        found[title] = {"trained": trained, "loss": steps[title](), "seconds": []}
        peak = meter.stop()
        found[title]["memory"] = peak.peak - peak.before
    losses = {title: one["loss"] for title, one in found.items() if "loss" in one}
    edited, scale = losses[OURS], abs(losses[OURS] - losses[FROZEN])
    for title, loss in losses.items():  # LoRA starts as the frozen model
        expected = edited if title.startswith("LoReFT") else losses[FROZEN]
        if not abs(loss - expected) <= TOLERANCE * scale:
            raise RuntimeError(f"{title}: first loss {loss:.5f}, expected {expected:.5f}")
    for _ in range(rounds):
        for title, step in steps.items():
            started = time.perf_counter()
            step()
            found[title]["seconds"].append(time.perf_counter() - started)
    for title in steps:
        pairs = zip(found[title]["seconds"], found[FROZEN]["seconds"], strict=True)
        found[title]["ratio"] = statistics.median(own / frozen for own, frozen in pairs)
    return found
