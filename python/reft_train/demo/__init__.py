"""``demo``: LoReFT on real weights and text beside a frozen model and a plain implementation, in
minutes on a CPU.
"""
