"""Measurements of reft_kernels beside other ways to do the same: ``python -m benchmarks.run
--list``.
"""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # the profiler that counts memory announces itself otherwise
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # ... and complains of memory that it did not see allocated
