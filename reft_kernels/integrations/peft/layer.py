"""The adapters of one model as PEFT sees them: tuner layers that hold the stacked parameters of one
width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from reft_kernels.interventions import Intervention
from reft_kernels.model import Editor

CONTAINER = "representation_edits"
"""Name of the child module added to an edited model. It must not contain the method's prefix:
PEFT skips modules whose path does."""


class ReftLayer(nn.Module, BaseTunerLayer):
    """The stacked interventions of one width, one for each adapter: a tuner layer without a base
    layer.
    """

    adapter_layer_names = ("reft_stack",)

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self.editor = editor
        self.reft_stack = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the ones that edit, in this order."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.editor.active = tuple(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn every edit on or off."""
        super().enable_adapters(enabled)
        self.editor.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; where it was active the first of the others takes its place, and with
        the last the hooks go.
        """
        self.editor.remove(adapter_name)
        if adapter_name in self.reft_stack:
            del self.reft_stack[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.editor.adapters:
            active = [min(self.editor.adapters)]
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {active[0]!r} is active now",
                stacklevel=2,
            )
        self.set_adapter(active)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible in place: see :meth:`ReftTuner.merge_and_unload`."""
        raise ValueError(
            "merge_adapter: ReFT edits are not weights of a base layer; merge_and_unload merges "
            "what is exact"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged in place."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter that was loaded onto its model's device; its dtype stays."""
        if adapter_name not in self.reft_stack:
            return
        target = device if device is not None else _device_of(self.editor.model)
        stack = self.reft_stack[adapter_name]
        if not any(t.is_meta for t in (*stack.parameters(), *stack.buffers())):
            stack.to(target)

    def extra_repr(self) -> str:
        return ", ".join(self.reft_stack)


class AdapterContainer(nn.Module):
    """The child of an edited model under which its adapters live: one :class:`ReftLayer` for each
    width.
    """

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self.editor = editor
        self.frozen: list[
            nn.Parameter
        ] = []  # what the first adapter froze, for an adapter that has to be taken back

    def layer(self, width: int) -> ReftLayer:
        """The layer of a width, made when first asked for."""
        name = f"d{width}"
        if name not in self._modules:
            layer = ReftLayer(self.editor)
            first = next(iter(self.children()), None)
            if first is not None:
                layer._active_adapter, layer._disable_adapters = (
                    first._active_adapter,
                    first._disable_adapters,
                )
            self.add_module(name, layer)
        return self._modules[name]

    def drop(self, adapter_name: str) -> None:
        """Take an adapter out of every layer, and layers that hold none out of the model."""
        for name, layer in list(self.named_children()):
            if adapter_name in layer.reft_stack:
                del layer.reft_stack[adapter_name]
            if not layer.reft_stack:
                del self._modules[name]

    def stacks(self, adapter_name: str) -> dict[int, Intervention]:
        """An adapter's stacks by width."""
        return {
            int(name[1:]): layer.reft_stack[adapter_name]
            for name, layer in self.named_children()
            if adapter_name in layer.reft_stack
        }


def find_container(model: nn.Module) -> tuple[str, AdapterContainer] | None:
    """The container of a model's adapters, and its path."""
    return next(
        ((name, m) for name, m in model.named_modules() if isinstance(m, AdapterContainer)), None
    )


def _device_of(model: nn.Module) -> torch.device:
    """Where a model's own first parameter is, adapters apart."""
    tensors: Any = (
        p for name, p in model.named_parameters() if not name.startswith(f"{CONTAINER}.")
    )
    first = next(tensors, None)
    return torch.device("cpu") if first is None or first.is_meta else first.device
