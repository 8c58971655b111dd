"""Traffic, a server process and its clients, and transformers in their place."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

START_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: token ids, the number of its adapter or None, and the tokens to generate."""

    prompt: tuple[int, ...]
    adapter: int | None
    new_tokens: int


def traffic(
    model: Path, requests: int, adapters: int, prompt: int, new_tokens: int, seed: int
) -> list[Asked]:
    """Return requests with random prompts of one length, each with the next adapter in turn."""
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    generator = torch.Generator().manual_seed(seed)
    shape = requests, prompt
    ids = torch.randint(vocabulary // 2, vocabulary, shape, generator=generator).tolist()
    return [
        Asked(tuple(row), number % adapters if adapters else None, new_tokens)
        for number, row in enumerate(ids)
    ]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(module: str, flags: Sequence[str], log: Path, kind: str) -> Iterator[Server]:
    """Start ``python -m module`` and yield it when it answers.

    Args:
        module: a server with vLLM's command line.
        flags: its flags without host and port.
        log: where its output goes.
        kind: prefix of the adapters' names.

    Raises:
        RuntimeError: It ended, or did not answer in time. The message has the end of the log.
    """
    port = free_port()
    # vLLM would leave a core to the HTTP server; all providers get the same threads
    variables = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    } | dict(os.environ)
    address = ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags, *address],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield Server(url, kind)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


class Server:
    """A server over HTTP.

    Args:
        url: its address.
        kind: prefix of the adapters' names.
    """

    def __init__(self, url: str, kind: str) -> None:
        self._url, self._kind = url, kind
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            self._base = json.load(answer)["data"][0]["id"]

    def answer(self, requests: Sequence[Asked], concurrency: int) -> tuple[float, list[float]]:
        """Return the seconds of all requests, and those to each first token."""
        return asyncio.run(self._drive(requests, concurrency))

    def check_that_adapters_edit(self, asked: Asked) -> None:
        """Raise RuntimeError if a request has the same probabilities with and without adapter."""
        found = []
        for model in (self._base, f"{self._kind}{asked.adapter}"):
            body = {"model": model, "prompt": asked.prompt, "max_tokens": 1, "logprobs": 1}
            call = urllib.request.Request(
                f"{self._url}/v1/completions",
                json.dumps(body | {"temperature": 0}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(call, timeout=600) as answer:
                found.append(json.load(answer)["choices"][0]["logprobs"]["token_logprobs"])
        if found[0] == found[1]:
            raise RuntimeError(f"{self._kind}{asked.adapter} changes nothing: {found[0]}")

    async def _drive(
        self, requests: Sequence[Asked], concurrency: int
    ) -> tuple[float, list[float]]:
        import aiohttp  # of vLLM's environment

        queue = iter(requests)
        first: list[float] = []

        async def client(session: Any) -> None:
            for asked in queue:
                first.append(await self._one(session, asked))

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=None) as session:
            start = time.perf_counter()
            await asyncio.gather(*(client(session) for _ in range(concurrency)))
            return time.perf_counter() - start, first

    async def _one(self, session: Any, asked: Asked) -> float:
        body = {
            "model": self._base if asked.adapter is None else f"{self._kind}{asked.adapter}",
            "prompt": asked.prompt,
            "max_tokens": asked.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start, first, generated = time.perf_counter(), None, 0
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"status {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"] and first is None:
                    first = time.perf_counter() - start
                if event.get("usage"):
                    generated = event["usage"]["completion_tokens"]
        if first is None or generated != asked.new_tokens:
            raise RuntimeError(f"got {generated} tokens, expected {asked.new_tokens}")
        return first


class Transformers:
    """transformers with PEFT: adapters are loaded into one model, and a call has one of them.

    Args:
        model: folder of the base model.
        adapters: adapter folders by name.
    """

    def __init__(self, model: Path, adapters: Mapping[str, Path]) -> None:
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._names = list(adapters)
        self._model: Any = base
        for number, (name, folder) in enumerate(adapters.items()):
            if number == 0:
                self._model = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def answer(self, requests: Sequence[Asked], concurrency: int) -> tuple[float, list[float]]:
        """Return as :meth:`Server.answer`. Waves of ``concurrency`` requests arrive at a time.

        The requests of a wave that have the same adapter are one batch.
        """
        first: list[float] = []
        start = time.perf_counter()
        for begin in range(0, len(requests), concurrency):
            arrived = time.perf_counter()
            batches: dict[int | None, list[Asked]] = {}
            for asked in requests[begin : begin + concurrency]:
                batches.setdefault(asked.adapter, []).append(asked)
            for adapter, batch in batches.items():
                if adapter is not None:
                    self._model.set_adapter(self._names[adapter])
                off = adapter is None and self._names
                with self._model.disable_adapter() if off else contextlib.nullcontext():
                    at = self._generate(batch)
                first += [at - arrived] * len(batch)
        return time.perf_counter() - start, first

    def _generate(self, batch: Sequence[Asked]) -> float:
        """Generate, and return when the first token was there."""
        clock = _FirstToken()
        ids = torch.tensor([asked.prompt for asked in batch])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=batch[0].new_tokens,
            min_new_tokens=batch[0].new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        assert out.shape[1] == ids.shape[1] + batch[0].new_tokens
        return clock.at


class _FirstToken(transformers.StoppingCriteria):
    """Notes when it is called first, which is after the first token. Stops nothing."""

    at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
