"""Gradient accumulation with one build of R per optimizer step, for PEFT models."""

from __future__ import annotations

from torch import nn

from reft_kernels.integrations.peft.layer import AdapterContainer
from reft_kernels.model.accumulation import SharedBuild


def share_build(model: nn.Module) -> SharedBuild:
    """Build R once per optimizer step of ``model``, until the returned object is closed.

    ::

        with share_build(model) as shared:
            for micro_batches in steps:
                for inputs in micro_batches:
                    (model(**inputs).loss / len(micro_batches)).backward()
                shared.flush()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: a model with ReFT adapters, or a wrapper of it (``PeftModel``,
            ``DistributedDataParallel``, a compiled model).

    Returns:
        A :class:`~reft_kernels.model.SharedBuild`.

    Raises:
        ValueError: the model has no ReFT adapters, contains several models that have, or already
            shares its builds.
    """
    editors = [m.editor for m in model.modules() if isinstance(m, AdapterContainer)]
    if len(editors) != 1:
        raise ValueError(f"model: got {len(editors)} models with ReFT adapters, expected one")
    (editor,) = editors
    if editor.shared is not None and not editor.shared.closed:
        raise ValueError("model: it already shares its builds; call close() first")
    editor.shared = SharedBuild()
    return editor.shared
