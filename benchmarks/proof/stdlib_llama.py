"""Train a small Llama from scratch on the standard library's sources.

It is a frozen base for machines that cannot download a model.
"""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path

import torch
from tqdm import tqdm

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, BATCH = 2048, 256, 4, 4, 256, 8
PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "xml",
)


def texts() -> list[str]:
    """Return the standard library's sources: top-level modules and :data:`PACKAGES`, no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py")) + [
        path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))
    ]
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for path in files
        if "test" not in path.relative_to(root).parts
    ]


def train_tokenizer(corpus: list[str]):
    """Train a byte-level BPE tokenizer with ``<s>``, ``</s>`` and ``<pad>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(names.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **names)


def train_llama(folder: Path, seconds: float, seed: int = 0) -> dict[str, float]:
    """Train for a number of seconds, and save the model and its tokenizer.

    Returns:
        The number of parameters, steps and tokens, and the first and last losses.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    corpus = texts()
    tokenizer = train_tokenizer(corpus)
    ids = torch.tensor(
        [i for text in corpus for i in [tokenizer.bos_token_id, *tokenizer(text).input_ids[1:]]]
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    started = time.perf_counter()
    with tqdm(total=round(seconds), desc="base model", unit="s", mininterval=10) as progress:
        while (elapsed := time.perf_counter() - started) < seconds:
            warm, left = min(1.0, (len(losses) + 1) / 50), 1 - elapsed / seconds
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * warm * max(0.05, 0.5 * (1 + math.cos(math.pi * (1 - left))))
            starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
            batch = torch.stack([ids[start : start + LENGTH] for start in starts])
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            progress.update(round(elapsed) - progress.n)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-50:]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(losses),
        "corpus_tokens": len(ids),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
    }
