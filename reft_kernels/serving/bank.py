"""Weights of many adapters on the device, in a fixed number of slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reft_kernels.arguments import EditWeights
from reft_kernels.serving.adapters import Form, ServedAdapter
from reft_kernels.serving.errors import AdapterError

SlotKey = tuple[str, int]
"""Content hash of an adapter, and the number of one of its weight sets."""


class Bank:
    """Stacked weights A, c and B of ``slots`` weight sets for each layer.

    The tensors are allocated once: ``[L, S, r, d]``, ``[L, S, r]`` and ``[L, S, r, d]`` in fp32.
    An adapter of a smaller rank is padded with zero rows, which change nothing. A layer that an
    adapter does not edit holds zeros. Slots are filled when a step needs them, and the least
    recently used one that the step does not need is overwritten; copies on the device are ordered
    after the kernels of earlier steps, so that no step in flight loses its weights.

    Args:
        layers: Numbers of the layers held here, in ascending order.
        width: Hidden size d.
        slots: S, the number of weight sets.
        max_rank: r, the largest rank.
        device: Device of the model.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        slots: int,
        max_rank: int,
        device: torch.device | str,
    ) -> None:
        self.layers, self.width, self.slots, self.max_rank = tuple(layers), width, slots, max_rank
        shape = (len(self.layers), slots, max_rank)
        self.read = torch.zeros((*shape, width), device=device)
        self.read_bias = torch.zeros(shape, device=device)
        self.write = torch.zeros((*shape, width), device=device)
        self._filled: OrderedDict[SlotKey, int] = OrderedDict()  # least recently used first
        self._free = list(range(slots - 1, -1, -1))
        self.hits = self.loads = self.evictions = 0
        self._weights = [
            {
                subtracts: EditWeights(read, bias, write, None, subtracts)
                for subtracts in (False, True)
            }
            for read, bias, write in zip(
                self.read.unbind(0), self.read_bias.unbind(0), self.write.unbind(0), strict=True
            )
        ]

    def weights(self, index: int, form: Form) -> EditWeights:
        """Return the weights of all slots for the layer with index ``index`` in ``layers``."""
        return self._weights[index][form.subtract_projection]

    def stats(self) -> dict[str, int]:
        """Return the numbers of slots and of filled ones, and counts since the start.

        A weight set that a step needs is a hit or a load; a load may evict another set.
        """
        return {
            "slots": self.slots,
            "resident": len(self._filled),
            "hits": self.hits,
            "loads": self.loads,
            "evictions": self.evictions,
        }

    @property
    def resident(self) -> set[str]:
        """Content hashes of the adapters that are in slots."""
        return {content for content, _ in self._filled}

    def place(
        self, keys: Sequence[SlotKey], adapters: Mapping[str, ServedAdapter]
    ) -> dict[SlotKey, int]:
        """Bring weight sets into slots and return the slot of each.

        Args:
            keys: The sets that a step needs, all of them at once.
            adapters: The adapters on the host, by content hash.

        Raises:
            AdapterError: If there are more different sets than slots.
        """
        wanted = dict.fromkeys(keys)
        if len(wanted) > self.slots:
            raise AdapterError(
                f"slots: got {len(wanted)} weight sets in one step, expected at most {self.slots}"
            )
        for key in wanted:
            if key in self._filled:
                self._filled.move_to_end(key)
                self.hits += 1
        for key in wanted:
            if key not in self._filled:
                slot = self._free.pop() if self._free else self._evict(wanted)
                self._fill(slot, adapters[key[0]], key[1])
                self.loads += 1
                self._filled[key] = slot
        return {key: self._filled[key] for key in wanted}

    def forget(self, content: str) -> None:
        """Free the slots of an adapter."""
        for key in [key for key in self._filled if key[0] == content]:
            self._free.append(self._filled.pop(key))

    def _evict(self, wanted: Mapping[SlotKey, None]) -> int:
        oldest = next(key for key in self._filled if key not in wanted)
        self.evictions += 1
        return self._filled.pop(oldest)

    def _fill(self, slot: int, adapter: ServedAdapter, weight_set: int) -> None:
        number = {layer: i for i, layer in enumerate(adapter.layers)}
        own = [i for i, layer in enumerate(self.layers) if layer in number]
        theirs = [number[self.layers[i]] for i in own]
        rank = adapter.rank
        for bank, source in (
            (self.read, adapter.read),
            (self.read_bias, adapter.read_bias),
            (self.write, adapter.write),
        ):
            padded = torch.zeros((len(self.layers), *bank.shape[2:]))
            if own:
                padded[own, :rank] = source[weight_set][theirs]
            bank[:, slot].copy_(_staged(padded, bank.device), non_blocking=True)


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor from which a copy to ``device`` need not wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory()
