"""The fp64 reference of a converted adapter, by hooks on the blocks of the tiny model."""

from __future__ import annotations

import torch

from reft_kernels.conversion.common import SavedAdapter
from tests.model.families import BATCH, LENGTH, VOCAB, blocks, make
from tests.plain import edit


def ids() -> torch.Tensor:
    """Return a batch without padding, so that positions are the same in every framework."""
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def rows_of(columns: list[int]) -> torch.Tensor:
    return (
        (torch.arange(BATCH).unsqueeze(1) * LENGTH + torch.tensor(columns))
        .flatten()
        .to(torch.int32)
    )


def own_weights(
    adapter: SavedAdapter, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return a set's weights by the names of :mod:`tests.plain`."""
    orthonormal, reads = adapter.kind.orthonormal, adapter.kind.reads
    names = {
        "read": "W" if orthonormal else "W1",
        "write": "R" if orthonormal else "W2",
        "bias": "b" if reads else "s",
    }
    return {names[k]: t.to(dtype) for k, t in weights.items() if k in names}


def exact(
    adapter: SavedAdapter, first: int, last: int, family: str = "llama", path: str | None = None
) -> torch.Tensor:
    """Return logits in fp64 with the first and last tokens edited.

    The edit is applied to each block's output, or to the output of the module at ``path``.
    """
    model = make(family).double()
    columns = [list(range(first)), list(range(LENGTH - last, LENGTH))]

    def hook_of(sets):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            for index, weights in enumerate(sets):
                chosen = columns[0] + columns[1] if len(sets) == 1 else columns[index]
                layer_weights = own_weights(adapter, weights, torch.float64)
                hidden = edit(
                    adapter.intervention,
                    hidden,
                    layer_weights,
                    rows=rows_of(chosen),
                    activation=adapter.activation,
                )
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    for layer, sets in adapter.layers.items():
        place = (
            blocks(family, model)[layer]
            if path is None
            else model.get_submodule(path.format(layer=layer))
        )
        place.register_forward_hook(hook_of(sets))
    tokens = ids()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
