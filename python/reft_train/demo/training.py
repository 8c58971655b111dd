"""Training and step timing of the demo's variants from a common initialization."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reft_kernels.interventions import Intervention
from reft_train import methods, models
from reft_train.config import RunConfig
from reft_train.demo.baselines import add_hooks
from reft_train.demo.data import Data
from reft_train.memory import Peak, PeakMeter
from reft_train.progress import bar

TITLES = {
    "frozen": "frozen model, trained head",
    "torch": "LoReFT, plain PyTorch",
    "kernels": "LoReFT, reft_kernels",
}
Texts = list[tuple[str, int]]


class Result(NamedTuple):
    """Trainable parameters, held-out accuracy, losses, memory and held-out logits of a variant."""

    edits: int
    head: int
    accuracy: float
    losses: list[float]
    memory: Peak
    logits: list[list[float]]


def build(name: str, config: RunConfig, data: Data) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """Build a variant with tokenizer and optimizer, with groups for the head and any edits."""
    transformers.utils.logging.disable_progress_bar()
    loaded = models.load(config, data)
    model, depth = loaded.model, loaded.model.config.num_hidden_layers
    layers = list(range(depth)) if config.layers == "all" else config.layers
    generator = torch.Generator().manual_seed(config.seed)
    start = torch.randn(len(layers), model.config.hidden_size, config.rank, generator=generator)
    rotations = torch.linalg.qr(start).Q.mT.contiguous()
    if name == "kernels":
        model = methods.adapt(config, loaded)
        (stack,) = (module for module in model.modules() if isinstance(module, Intervention))
        with torch.no_grad():  # the plain baseline starts from the same edits
            stack.set_R(rotations)
            stack.W.copy_(stack.R)
    else:
        model.classifier.requires_grad_(True)
    if name == "torch":
        add_hooks(model, layers, rotations, config.positions)
    if name == "reference":  # so that the backward runs through every frozen layer
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # so that the variants can be compared step by step
    model.to(models.pick_device(config)).train()
    named = {path: part for path, part in model.named_parameters() if part.requires_grad}
    head = [part for path, part in named.items() if "classifier." in path]
    edits = [part for path, part in named.items() if "classifier." not in path]
    groups = [{"params": head, "lr": config.head_lr}, {"params": edits, "lr": config.lr}]
    return model, loaded.tokenizer, torch.optim.AdamW(groups, weight_decay=0.0)


def batches(
    tokenizer: Any, texts: Texts, config: RunConfig, epoch: int | None = None
) -> list[dict[str, Tensor]]:
    """Batch the texts, shuffled by seed and epoch, or in order if ``epoch`` is None."""
    generator, device = (
        torch.Generator().manual_seed(1_000 * config.seed + (epoch or 0)),
        models.pick_device(config),
    )
    order = (
        range(len(texts))
        if epoch is None
        else torch.randperm(len(texts), generator=generator).tolist()
    )
    made = []
    for start in range(0, len(order), config.batch_size):
        rows = [texts[row] for row in order[start : start + config.batch_size]]
        options = {
            "truncation": True,
            "max_length": config.max_length,
            "padding": True,
            "return_tensors": "pt",
        }
        batch = tokenizer([text for text, _ in rows], **options).to(device)
        labels = torch.tensor([label for _, label in rows], device=device)
        made.append(
            {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": labels,
            }
        )
    return made


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = cross_entropy(logits, batch["labels"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Any, texts: Texts, config: RunConfig) -> Tensor:
    """Return the logits ``[N, labels]`` in the order of the texts."""
    model.eval()
    return torch.cat(
        [model(**batch).logits.float().cpu() for batch in batches(tokenizer, texts, config)]
    )


def train(name: str, config: RunConfig, data: Data, adapter: Path) -> Result:
    """Train a variant, predict the held-out texts, and save the adapter of reft_kernels."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    model, tokenizer, optimizer = build(name, config, data)
    steps = config.epochs * -(-len(data.train) // config.batch_size)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    meter, losses = PeakMeter(torch.device(models.pick_device(config))), []
    meter.start()
    with bar(steps, TITLES[name]) as shown:
        for batch in (
            batch
            for epoch in range(config.epochs)
            for batch in batches(tokenizer, data.train, config, epoch)
        ):
            losses.append(_step(model, optimizer, batch).item())
            scheduler.step()
            shown.update()
    memory, logits = meter.stop(), predict(model, tokenizer, data.held_out, config)
    if not logits.isfinite().all():
        raise FloatingPointError(
            f"{TITLES[name]}: the logits are not finite; a lower --lr may help"
        )
    if name == "kernels":
        methods.save_adapter(model, adapter)
    right = logits.argmax(1) == torch.tensor([label for _, label in data.held_out])
    head, edits = (
        sum(part.numel() for part in group["params"]) for group in optimizer.param_groups
    )
    return Result(edits, head, right.float().mean().item(), losses, memory, logits.tolist())


def reloaded_differs(config: RunConfig, data: Data, adapter: Path, result: Result) -> float:
    """Return the largest logit difference between the trained model and its reloaded adapter."""
    # another seed gives another head, which the adapter must replace
    loaded = models.load(config.replace(seed=config.seed + 1), data)
    fresh = methods.load_adapter(loaded, adapter).to(models.pick_device(config))
    logits = predict(fresh, loaded.tokenizer, data.held_out, config)
    return (logits - torch.tensor(result.logits)).abs().max().item()


def step_times(config: RunConfig, data: Data, rounds: int) -> dict[str, float]:
    """Return the median ratio of a step's time to the frozen model's forward and backward time."""
    names, times = ["reference", *TITLES], []
    built = {name: build(name, config, data) for name in names}
    parts = batches(built["frozen"][1], data.train, config, 0)
    wait: Callable = (
        torch.cuda.synchronize if models.pick_device(config) == "cuda" else lambda: None
    )
    for number in range(3 + rounds):
        seconds = {}
        for name in names[number % 4 :] + names[: number % 4]:
            wait()
            started = time.perf_counter()
            _step(built[name][0], built[name][2], parts[number % len(parts)])
            wait()
            seconds[name] = time.perf_counter() - started
        times.append(seconds)
    return {name: statistics.median(s[name] / s["reference"] for s in times[3:]) for name in TITLES}
