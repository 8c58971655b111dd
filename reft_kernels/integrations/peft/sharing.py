"""Gradient accumulation with one build of R for each optimizer step, for a PEFT model however it
is wrapped.
"""

from __future__ import annotations

from torch import nn

from reft_kernels.integrations.peft.layer import AdapterContainer
from reft_kernels.model.accumulation import SharedBuild


def share_build(model: nn.Module) -> SharedBuild:
    """Build R once for each optimizer step of ``model`` until the result is closed.

    ::

        with share_build(model) as shared:
            for micro_batches in steps:
                for inputs in micro_batches:
                    (model(**inputs).loss / len(micro_batches)).backward()
                shared.flush()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: a model with ReFT adapters, or whatever wraps one (``PeftModel``,
            ``DistributedDataParallel``, a compiled model).

    Raises:
        ValueError: no ReFT adapter, or several edited models, or one that shares its builds
            already.
    """
    editors = [m.editor for m in model.modules() if isinstance(m, AdapterContainer)]
    if len(editors) != 1:
        raise ValueError(f"model: got {len(editors)} models with ReFT adapters, expected one")
    (editor,) = editors
    if editor.shared is not None and not editor.shared.closed:
        raise ValueError("model: it shares its builds already; close() ends that")
    editor.shared = SharedBuild()
    return editor.shared
