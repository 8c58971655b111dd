"""All tests and measurements that need a GPU, in one command: ``benchmarks/gpu_pass.sh``."""
