"""``demo``: LoReFT on real weights and text, beside a frozen model and plain PyTorch."""
