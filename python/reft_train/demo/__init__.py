"""``demo``: LoReFT on real weights and text, compared with a frozen model and plain PyTorch."""
