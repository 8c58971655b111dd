"""Training program built on reft_kernels.

``python -m reft_train --help`` lists its commands.
"""
