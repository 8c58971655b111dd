"""Question 4: what does a LoReFT training step cost over the frozen model's own?

    python -m benchmarks.training_step [--quick] [--csv FILE] [--device cpu|cuda]

A Llama-like model with random weights (hidden 2048, 4 layers, batch 4 x 64 tokens; LoReFT f7+l7, rank 8, every layer). The
baseline is the frozen model's forward and its backward to the input embeddings, which is what any method that edits inside the
model must pay; the LoReFT step adds the edits, the build of R, their gradients and AdamW.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import timing
from reft_kernels.integrations.peft import ReftConfig


def _model(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=8192, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cost of a LoReFT step over the frozen model's forward and backward.")
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    hidden, layers, batch, length = (256, 2, 2, 32) if args.quick else (2048, 4, 4, 64)
    device, rounds = args.device, 3 if args.quick else 15

    frozen = _model(hidden, layers).to(device)
    edited = get_peft_model(_model(hidden, layers), ReftConfig(layers="all", rank=8, positions="f7+l7")).to(device)
    optimizer = torch.optim.AdamW([p for p in edited.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8192, (batch, length), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    mask = torch.ones_like(ids)

    def frozen_step() -> None:
        embeddings = frozen.get_input_embeddings()(ids).requires_grad_()
        frozen(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss.backward()

    def loreft_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        edited(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()

    rows = timing.compare(
        "training step", {"frozen model": frozen_step, "LoReFT by reft_kernels": loreft_step}, "frozen model",
        shape=f"llama hidden={hidden} layers={layers} batch={batch}x{length} f7+l7 r=8", dtype="float32", device=device,
        rounds=rounds,
    )  # fmt: skip
    timing.show(rows)
    if args.csv:
        timing.append(rows, args.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
