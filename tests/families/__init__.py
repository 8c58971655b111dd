"""Tests of all supported model families of transformers, compared with plain PyTorch hooks."""
