"""The memory that a training needs, estimated from the model's configuration before any weight is
read.

With B the batch, S the tokens of an example, T = B S, e the bytes of a number in the forward (2
under autocast), V the
vocabulary, h the hidden size:

    frozen       numbers times their bytes, buffers included; quantized linear layers: 8bit 1 +
                 4/inputs bytes a number, 4bit
                 (NF4, doubly quantized) 1/2 + 1/64 + 4/(64 256); embeddings, output layer and heads
                 stay as they are
    trained      numbers times 4 (fp32; a head as its dtype says), gradients the same, Adam's two
                 moments twice that
    layer        T (e K + (4 - e) N) kept for the backward, K the outputs of the layer's linear
                 modules and, for each module
                 that holds several, the inputs of its last; N the widths of RMSNorms, which keep
                 their input in fp32.
                 Llama's K is 2q + 2k + 3i + 2h, with q, k, i the widths of queries, keys and
                 feed-forward. Eager attention
                 adds heads B S^2 (e + 4), or 4 in fp32. Linear modules that are trained keep their
                 input, 4 bytes a number
    edits        rows that are edited times h e, for each edited layer
    activations  the sum over the layers that the backward passes (after the first edit of a block's
                 output, from the first
                 trained layer on otherwise), T h e of the last norm, and the larger of one layer
                 more (the gradients that are
                 under way) and of a language model's logits: T V (4 * 4 + e, or 4 * 4 in fp32), for
                 logits, log-softmax and
                 both gradients in fp32. With gradient checkpointing T h e for each layer, and two
                 layers or the logits
    autocast     2 bytes for each number of a linear module: its copy is kept, as frozen weights are
                 not cached

Left out: what the libraries themselves occupy, what the allocator holds beyond what is used (on a
CPU a trial's resident memory shows both), experts of a mixture (their weights count), sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reft_train.config import REFT_METHODS, RunConfig
from reft_train.doctor.skeleton import Skeleton, Widths, build, linears
from reft_train.models import CAUSAL, CLASSIFICATION
from reft_train.tasks.base import Task

_QUANTIZED = {
    "8bit": lambda inputs: 1 + 4 / inputs,
    "4bit": lambda inputs: 0.5 + 1 / 64 + 4 / (64 * 256),
}


@dataclass(frozen=True)
class Estimate:
    """Numbers and bytes; ``activations`` hold autocast's copies too."""

    model_numbers: int
    trainable: int
    head: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def step(self) -> int:
        """What a step needs over the weights."""
        return self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """Everything."""
        return self.frozen + self.trained + self.step


def _frozen_bytes(config: RunConfig, skeleton: Skeleton) -> int:
    size = skeleton.base_bytes
    if config.quantization == "none":
        return size
    model = skeleton.adapted.get_base_model()
    output = model.get_output_embeddings()
    for name, module, (inputs, outputs) in linears(model):
        weight = module.weight
        kept = (
            module is output
            or ".modules_to_save." in f".{name}"
            or ".original_module" in f".{name}"
        )
        if not kept and not weight.requires_grad:
            size += round(
                inputs * outputs * (_QUANTIZED[config.quantization](inputs) - weight.element_size())
            )
    return size


def compute_bytes(config: RunConfig, skeleton: Skeleton) -> int:
    """Bytes of a number in the forward."""
    if config.mixed_precision != "no":
        return 2
    return next(p.element_size() for p in skeleton.adapted.parameters() if not p.requires_grad)


def _edited_rows(config: RunConfig, length: int) -> int:
    from reft_kernels.positions import parse

    spec = parse(config.positions)
    count = (spec.first or 0) + (spec.last or 0)
    return config.batch_size * (min(count, length) if count else length)


def _trained_inputs(skeleton: Skeleton) -> int:
    return sum(
        shape[0] for _, module, shape in linears(skeleton.adapted) if module.weight.requires_grad
    )


def length_of(config: RunConfig, skeleton: Skeleton) -> int:
    """Tokens of an example: ``max_length``, as far as the model reads."""
    return (
        config.max_length if skeleton.longest is None else min(config.max_length, skeleton.longest)
    )


def saved_bytes(config: RunConfig, skeleton: Skeleton) -> int:
    """What the forward keeps for the backward, logits apart, without gradient checkpointing."""
    if config.method == "head":
        return 0
    length, size = length_of(config, skeleton), compute_bytes(config, skeleton)
    tokens = config.batch_size * length
    layers = [layer for blocks in _reached(config, skeleton) for layer in blocks]
    kept = (
        sum(_layer_bytes(config, skeleton, layer.kept, layer.normed) for layer in layers)
        + tokens * skeleton.hidden * size
    )
    if config.method in REFT_METHODS:
        edited = sum(map(len, skeleton.widths)) if config.layers == "all" else len(config.layers)
        return kept + edited * _edited_rows(config, length) * skeleton.hidden * size
    return kept + tokens * _trained_inputs(skeleton) * 4


def _layer_bytes(config: RunConfig, skeleton: Skeleton, kept: int, normed: int) -> int:
    length, size = length_of(config, skeleton), compute_bytes(config, skeleton)
    tokens = config.batch_size * length
    scores = 4 if size == 4 else 4 + size
    eager = scores * skeleton.heads * config.batch_size * length**2 if skeleton.eager else 0
    return tokens * (size * kept + (4 - size) * normed) + eager


def _reached(config: RunConfig, skeleton: Skeleton) -> list[list[Widths]]:
    """The layers that the backward passes; all of an encoder-decoder's, whose two stacks depend
    on each other.
    """
    if config.method == "head":
        return []
    if len(skeleton.widths) > 1:
        return skeleton.widths
    first = (
        0
        if config.layers == "all" or config.method not in (*REFT_METHODS, "lora", "dora")
        else min(config.layers)
    )
    after = config.method in REFT_METHODS and config.component == "block_output"
    return [blocks[first + after :] for blocks in skeleton.widths]


def _activations(config: RunConfig, skeleton: Skeleton) -> int:
    size = compute_bytes(config, skeleton)
    tokens = config.batch_size * length_of(config, skeleton)
    everything = [layer for blocks in skeleton.widths for layer in blocks]
    largest = max((_layer_bytes(config, skeleton, w.kept, w.normed) for w in everything), default=0)
    generates = skeleton.kind != CLASSIFICATION
    logits = tokens * skeleton.vocabulary * (16 + (size if size < 4 else 0)) if generates else 0
    copies = 2 * sum(layer.linear for layer in everything) if config.mixed_precision != "no" else 0
    if config.gradient_checkpointing:
        reached = sum(map(len, _reached(config, skeleton)))
        return (
            reached * tokens * skeleton.hidden * size
            + max(2 * largest, logits)
            + copies // max(len(everything), 1)
        )
    return saved_bytes(config, skeleton) + max(largest, logits) + copies


def estimate(config: RunConfig, task: Task, skeleton: Skeleton | None = None) -> Estimate:
    """The memory of a training with these settings.

    Args:
        skeleton: the model, where it was built already; for these settings' model, method and
            dtype.

    Raises:
        UserError: as :func:`reft_train.doctor.skeleton.build`.
    """
    skeleton = build(config, task) if skeleton is None else skeleton
    trained = {name: p for name, p in skeleton.adapted.named_parameters() if p.requires_grad}
    head = sum(p.numel() for name, p in trained.items() if "modules_to_save." in name)
    size = sum(p.numel() * p.element_size() for p in trained.values())
    return Estimate(
        model_numbers=skeleton.base_numbers,
        trainable=sum(p.numel() for p in trained.values()) - head,
        head=head,
        frozen=_frozen_bytes(config, skeleton),
        trained=size,
        gradients=size,
        optimizer=2 * size,
        activations=_activations(config, skeleton),
    )


def remedies(
    config: RunConfig, task: Task, skeleton: Skeleton, memory: int, cuda: bool
) -> Iterator[tuple[str, Estimate]]:
    """Settings that need less, each with its estimate: all that could fit, or those tried where
    none does.

    Args:
        memory: bytes that there are.
        cuda: whether there is a GPU, which quantization needs.
    """
    tried = []
    if not config.gradient_checkpointing:
        tried.append(config.replace(gradient_checkpointing=True))
    batch = config.batch_size
    while batch > 1 and estimate(config.replace(batch_size=batch), task, skeleton).total > memory:
        batch //= 2
    if batch < config.batch_size:
        factor = -(-config.batch_size // batch)
        tried.append(config.replace(batch_size=batch, accumulation=config.accumulation * factor))
    if cuda and config.quantization == "none" and skeleton.kind == CAUSAL:
        tried.append(config.replace(quantization="4bit"))
    found = []
    for changed in tried:
        names = [
            name for name, value in changed.to_dict().items() if value != getattr(config, name)
        ]
        flags = " ".join(
            "--"
            + name.replace("_", "-")
            + ("" if getattr(changed, name) is True else f" {getattr(changed, name)}")
            for name in names
        )
        found.append((flags, estimate(changed, task, skeleton)))
    fitting = [pair for pair in found if pair[1].total <= memory]
    yield from fitting or found
