"""Time of calls inside CUDA graphs, which excludes the host's time.

A graph holds at least ``CALLS`` calls, so that the few microseconds of a replay do not count. The
calls rotate through the input sets, and the results of one rotation are kept, so that neither
inputs nor outputs of a call are still in the cache. Calls that need a preparation, such as the
forward pass of a backward pass, are prepared on the capture stream before the capture: autograd
runs each backward function on the stream of its forward function.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from benchmarks.protocol import Call

CALLS = 32


def calls_of(sets: int) -> int:
    """Return the number of calls in a graph: whole rotations, at least ``CALLS``."""
    return sets * -(-CALLS // sets)


class CallGraph:
    """A CUDA graph of the calls of one provider.

    Args:
        calls: One call per input set.

    Raises:
        Exception: Whatever a call raises when it is captured, for example because it synchronizes
            with the host.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.count = calls_of(len(calls))
        self._graph = torch.cuda.CUDAGraph()
        # the graph reads what the preparation made
        self._prepared: list[object] = []
        self._kept: deque[object] = deque(maxlen=len(calls))
        # a failed capture leaves its stream selected; the outer context selects the former one
        with torch.cuda.stream(torch.cuda.current_stream()):
            self._capture(calls, torch.cuda.Stream())

    def _capture(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                with call.context():
                    self._prepared.append(call.before())
                    self._kept.append(call.repeat(self._prepared[-1]))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            for number in range(self.count):
                call = calls[number % len(calls)]
                with call.context():
                    self._kept.append(call.repeat(self._prepared[number % len(calls)]))

    def seconds(self) -> float:
        """Replay the graph and return the seconds of one call."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.count
