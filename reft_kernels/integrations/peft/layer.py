"""PEFT tuner layers with the stacked parameters of a model's ReFT adapters."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from reft_kernels.interventions import Intervention
from reft_kernels.model import Editor

CONTAINER = "representation_edits"
"""Name of the child module that is added to an edited model.

Must not contain the prefix of the method, because PEFT skips modules whose path contains it.
"""


class ReftLayer(nn.Module, BaseTunerLayer):
    """A tuner layer without a base layer: one stacked intervention of one width per adapter.

    Args:
        editor: the editor of the model.
    """

    adapter_layer_names = ("reft_stack",)
    reft_stack: nn.ModuleDict
    active_adapters: list[str]  # property of BaseTunerLayer

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self.editor = editor
        self.reft_stack = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, in the order in which they edit."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.editor.active = tuple(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all edits."""
        super().enable_adapters(enabled)
        self.editor.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        If it was the only active one, activates the first of the others by name. Deleting the last
        adapter removes the hooks.
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
        """Not supported in place; use :meth:`ReftTuner.merge_and_unload`.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "merge_adapter: ReFT edits are not weights of a base layer; merge_and_unload merges "
            "edits for which this is exact"
        )

    def unmerge(self) -> None:
        """Do nothing: adapters are never merged in place."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move a loaded adapter to the device of the model; keeps its dtype."""
        if adapter_name not in self.reft_stack:
            return
        target = device if device is not None else device_of(self.editor.model)
        stack = self.reft_stack[adapter_name]
        if not any(t.is_meta for t in (*stack.parameters(), *stack.buffers())):
            stack.to(target)

    def extra_repr(self) -> str:
        return ", ".join(self.reft_stack)


class AdapterContainer(nn.Module):
    """The child of an edited model that contains its adapters: one :class:`ReftLayer` per width.

    Args:
        editor: the editor of the model.

    Attributes:
        frozen: parameters that the first adapter froze, to undo a failed injection.
    """

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self.editor = editor
        self.frozen: list[nn.Parameter] = []

    def _layers(self) -> dict[str, ReftLayer]:
        return {name: m for name, m in self._modules.items() if isinstance(m, ReftLayer)}

    def layer(self, width: int) -> ReftLayer:
        """The layer of a width; created if there is none."""
        name = f"d{width}"
        layers = self._layers()
        if name in layers:
            return layers[name]
        layer = ReftLayer(self.editor)
        first = next(iter(layers.values()), None)
        if first is not None:
            layer._active_adapter = first._active_adapter
            layer._disable_adapters = first._disable_adapters
        self.add_module(name, layer)
        return layer

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter from all layers, and remove layers without adapters."""
        for name, layer in self._layers().items():
            if adapter_name in layer.reft_stack:
                del layer.reft_stack[adapter_name]
            if not layer.reft_stack:
                del self._modules[name]

    def stacks(self, adapter_name: str) -> dict[int, Intervention]:
        """The stacked interventions of an adapter, by width."""
        stacks: dict[int, Intervention] = {}
        for name, layer in self._layers().items():
            if adapter_name in layer.reft_stack:
                stack = layer.reft_stack[adapter_name]
                assert isinstance(stack, Intervention)
                stacks[int(name[1:])] = stack
        return stacks


def find_container(model: nn.Module) -> tuple[str, AdapterContainer] | None:
    """The path and the container of a model's adapters; None if it has none."""
    return next(
        ((name, m) for name, m in model.named_modules() if isinstance(m, AdapterContainer)), None
    )


def container_of(model: nn.Module) -> AdapterContainer | None:
    """The container that is a child of ``model``; None if it has none."""
    container = model._modules.get(CONTAINER)
    return container if isinstance(container, AdapterContainer) else None


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter outside the adapters; CPU if it is a meta tensor."""
    parameters = (p for name, p in model.named_parameters() if not name.startswith(f"{CONTAINER}."))
    first = next(parameters, None)
    return torch.device("cpu") if first is None or first.is_meta else first.device
