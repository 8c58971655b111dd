"""Every model family of transformers that the library claims, against plain PyTorch hooks."""
