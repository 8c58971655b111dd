"""Run every suite's quick cases under pytest-benchmark.

Each case is a group and each provider a benchmark:

    pytest benchmarks --benchmark-only
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import harness, suites
from benchmarks.protocol import ProviderUnavailable, RunSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _providers() -> Iterator[object]:
    settings = RunSettings(DEVICE, quick=True)
    for name in suites.NAMES:
        for case in (spec.build() for spec in suites.specs(name, settings)):
            group = f"{name} {case.mode} {case.label}"
            for provider in case.providers:
                yield pytest.param(
                    group, case.providers[provider], id=f"{group} {provider}".replace(" ", "-")
                )


@pytest.mark.parametrize(("group", "provider"), _providers())
def test_provider(benchmark, group, provider):
    benchmark.group = group
    try:
        verdict = provider.check() if provider.check else None
        call = provider.prepare(0)
    except ProviderUnavailable as reason:
        pytest.skip(str(reason))
    assert verdict is None or verdict.error <= verdict.allowed

    def run(prepared: object) -> None:
        call.run(prepared)
        harness.synchronize(DEVICE)

    with call.context():
        benchmark.pedantic(run, setup=lambda: ((call.before(),), {}), rounds=5, warmup_rounds=1)
