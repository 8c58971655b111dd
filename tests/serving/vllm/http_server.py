"""A server process of ``reft-serve`` for tests, and what transformers with PEFT answers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START = [sys.executable, "-m", "reft_kernels.serving.vllm.serve"]
API_KEY = "none"  # that of docs/serving.md
# small and eager, so that the server starts in seconds and computes as transformers does
FLAGS = [
    *("--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"),
    *("--max-model-len", "512", "--max-num-seqs", "32", "--disable-uvicorn-access-log"),
    *("--api-key", API_KEY, "--block-size", "32"),  # 128 by default, more than the prompts have
]
PATIENCE = 600


def environment() -> dict[str, str]:
    """Return the environment of a server: no network, little memory, this tree's sources."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the machine may have other work
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
    }


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HttpServer:
    """A running server.

    Attributes:
        url: its address, without ``/v1``.
        pid: of the HTTP process, whose child is the engine.
    """

    def __init__(self, url: str, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self._log = url, process, log

    @property
    def log(self) -> str:
        """What the server has written."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> str:
        """Return the body of a GET with the key."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def processes(self) -> list[int]:
        """Return the ids of the HTTP process and of all its descendants."""
        found, stack = [], [self.process.pid]
        while stack:
            pid = stack.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    stack += [int(child) for child in (task / "children").read_text().split()]
        return found

    def resident_kib(self) -> int:
        """Return the resident memory of all processes, in KiB."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        total += int(line.split()[1])
        return total


@contextlib.contextmanager
def serving(flags: Sequence[str], folder: Path, cwd: Path | None = None) -> Iterator[HttpServer]:
    """Start ``reft-serve`` and stop it at the end.

    Args:
        flags: command line without host and port.
        folder: where the log goes.
        cwd: working directory of the server.
    """
    port, log = free_port(), folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*START, *flags, *FLAGS, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=cwd,
            start_new_session=True,
        )
    server = HttpServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _wait(server: HttpServer) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with {server.process.returncode}:\n{server.log}")
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server did not answer in {PATIENCE} s:\n{server.log}")
