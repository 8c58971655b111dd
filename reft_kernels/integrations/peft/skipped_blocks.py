"""Runs a backbone without its first blocks, and records the hidden states after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from reft_kernels.model.components import Target, find_blocks
from reft_kernels.model.per_thread import PerThread


class Recording:
    """The hidden states after the first blocks, ``[B, T, d]``; None if none was recorded."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None


class _Running:
    """How the blocks run in one thread.

    Attributes:
        first: number of first blocks.
        entering: hidden states to return in place of the first blocks'; None: they run.
        recording: where to record what the first blocks return.
        stops: whether the blocks after the first ones are skipped.
    """

    def __init__(self) -> None:
        self.first = 0
        self.entering: Tensor | None = None
        self.recording: Recording | None = None
        self.stops = False


class _Layout:
    """What the blocks of a model return.

    Attributes:
        wraps: whether a block returns a tuple of its hidden state; known once one has run.
    """

    def __init__(self) -> None:
        self.wraps = False


class _Block:
    """The ``forward`` of one block."""

    def __init__(
        self, block: nn.Module, number: int, threads: PerThread[_Running], layout: _Layout
    ) -> None:
        self.block = block
        self.layout = layout
        self.number = number
        self.threads = threads
        self.replaced = block.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.threads.here
        last = self.number == running.first - 1
        below = self.number < running.first
        if (below and running.entering is not None) or (running.stops and not below):
            hidden = args[0] if args else kwargs["hidden_states"]
            if last:
                hidden = running.entering
            return (hidden,) if self.layout.wraps else hidden
        if self.replaced is not None:
            output = self.replaced(*args, **kwargs)
        else:
            output = type(self.block).forward(self.block, *args, **kwargs)
        if last and running.recording is not None:
            running.recording.hidden = self._hidden_state(output)
        return output

    def _hidden_state(self, output: Any) -> Tensor:
        """The hidden state ``[B, T, d]`` that the block returns, alone or as a tuple of one.

        Raises:
            ValueError: it returns something else.
        """
        self.layout.wraps = isinstance(output, tuple) and len(output) == 1
        hidden = output[0] if self.layout.wraps else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise ValueError(
                f"model: {type(self.block).__name__} returns {type(output).__name__}, expected a "
                "hidden state [B, T, d], to keep those below the first edit"
            )
        return hidden

    def __getstate__(self) -> dict:
        raise TypeError(
            "a model that keeps prefix states cannot be copied or pickled; call close() first"
        )


class SkippedBlocks:
    """The blocks of a backbone, whose first ones can be skipped.

    Args:
        model: the model.
        backbone: the part of it that runs the blocks.

    Raises:
        ValueError: the backbone has no list of blocks.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module) -> None:
        found = find_blocks(model)
        if found is None or not any(m is found.blocks for m in backbone.modules()):
            raise ValueError(f"model: no list of blocks found in {type(backbone).__name__}")
        self._backbone = backbone
        self.path, self.blocks = found
        self._threads = PerThread(_Running)
        self._forwards: list[_Block] = []

    @property
    def checkpointed(self) -> bool:
        """Whether gradient checkpointing is on."""
        modules = (self._backbone, *self.blocks)
        return any(getattr(module, "gradient_checkpointing", False) for module in modules)

    def unedited(self, targets: Sequence[Target]) -> int:
        """Number of first blocks that no edit enters; those whose output is edited count.

        Raises:
            ValueError: an edit is outside the blocks.
        """
        outside = [t.path for t in targets if not t.path.startswith(f"{self.path}.")]
        if outside or any(t.stream != "tokens" for t in targets):
            raise ValueError(
                f"component: {(outside or [targets[0].path])[0]} is edited, expected parts of "
                f"{self.path} only, to keep prefix states"
            )
        first = min(target.layer for target in targets)
        # in layer 0 this would keep one hidden state of each token to save one layer
        whole = first and all(
            t.path == f"{self.path}.{first}" and t.side == "output"
            for t in targets
            if t.layer == first
        )
        return first + bool(whole)

    def install(self) -> None:
        """Replace the ``forward`` of each block."""
        layout = _Layout()
        for number, block in enumerate(self.blocks):
            forward = _Block(block, number, self._threads, layout)
            self._forwards.append(forward)
            block.__dict__["forward"] = forward

    def remove(self) -> None:
        """Restore the blocks; where other code has wrapped ``forward`` since, it runs the block."""
        for forward in self._forwards:
            attributes = forward.block.__dict__
            if attributes.get("forward") is forward:
                if forward.replaced is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward.replaced
        self._forwards.clear()

    def enter(self, first: int, entering: Tensor | None) -> None:
        """Let the first blocks return ``entering``, until :meth:`leave`."""
        running = self._threads.here
        running.first, running.entering = first, entering

    def leave(self) -> None:
        """Let all blocks run."""
        running = self._threads.here
        running.first, running.entering = 0, None

    @contextlib.contextmanager
    def recording(self, first: int, all_blocks: bool) -> Iterator[Recording]:
        """Record the hidden states after the first blocks; the others run if ``all_blocks``."""
        running, recording = self._threads.here, Recording()
        running.first, running.recording = first, recording
        running.stops = not all_blocks
        try:
            yield recording
        finally:
            running.first, running.recording, running.stops = 0, None, False
