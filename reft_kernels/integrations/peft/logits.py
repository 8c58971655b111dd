"""Training with the logits of supervised tokens only, for models with any PEFT adapter."""

from __future__ import annotations

from torch import nn

from reft_kernels.model import SupervisedLogits


def keep_supervised_logits(model: nn.Module) -> SupervisedLogits:
    """Compute the logits of supervised tokens only, until the returned object is closed.

    ::

        with keep_supervised_logits(model):
            trainer.train()

    Loss and gradients are those of the model; only the output layer runs on fewer tokens: those
    whose next token has a label other than -100. This saves most where answers are short and
    vocabularies large. Calls in training mode return ``logits=None``. Calls in evaluation mode,
    such as the evaluations of a ``Trainer``, return all logits; so do the calls listed at
    :class:`~reft_kernels.model.SupervisedLogits`.

    Args:
        model: a causal language model of transformers, with or without adapters of any PEFT method,
            or a wrapper of it (``PeftModel``, ``DistributedDataParallel``).

    Returns:
        A :class:`~reft_kernels.model.SupervisedLogits`.

    Raises:
        ValueError: the model is not a causal language model, does not compute its loss by
            ``loss_function`` on logits that ``logits_to_keep`` selects, or does so already.
    """
    return SupervisedLogits(model)
