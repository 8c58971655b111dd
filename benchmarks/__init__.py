"""Benchmarks of reft_kernels against other implementations of ReFT.

``python -m benchmarks.run --list`` lists the suites.
"""

import os

# silence the profiler's start message and its warnings about unknown allocations
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
