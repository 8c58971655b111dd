"""Engines and oracles of the tests of the vLLM plugin.

The engine runs in the test's process, in fp32, and each model's engine is loaded once.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

REASON = "vLLM is not installed: make test-vllm runs these tests in an environment of their own"


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in here:
        item.add_marker("vllm")
        if importlib.util.find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason=REASON))


os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other programs use the cores, too


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A folder for models and adapters."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def serve(folders):
    """Return a function that loads a model with its adapters into an engine."""
    from tests.serving.vllm.engines import Served

    open_engines = []

    def load(kind: str, **options) -> Served:
        served = Served(folders, kind, **options)
        open_engines.append(served)
        return served

    yield load
    for served in open_engines:
        served.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A server over HTTP with the adapters a to d, and clients of it."""
    from tests.serving.vllm.http_site import running_site

    with running_site(tmp_path_factory.mktemp("site")) as running:
        yield running
