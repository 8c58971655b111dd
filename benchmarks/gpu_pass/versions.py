"""Print the versions, the GPU, the driver, the commit and the backends that serve each operator.

python -m benchmarks.gpu_pass.versions
"""

from __future__ import annotations

import torch

from benchmarks import machine
from reft_kernels import env

_PACKAGES = ("numpy", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ninja")


def main() -> int:
    """Print the report. Returns 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"commit {machine.commit()}, sources {machine.sources_digest()}")
    print(f"device {machine.device_name(device)}, driver {machine.driver(device) or 'none'}")
    print(env.report())
    print(", ".join(f"{name} {machine.version(name) or 'absent'}" for name in _PACKAGES))
    if device == "cuda":
        print(torch.cuda.get_device_properties(0))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
