"""One build of R for each optimizer step, however many micro-batches it accumulates.

Without this every forward builds the weights W(theta) of all layers and every backward runs through
the build. The gradient is linear in what arrives at the built weights, so with micro-batch losses
l_1 .. l_k

    d(l_1 + ... + l_k) / d theta = (dW / d theta)^T (dl_1 / dW + ... + dl_k / dW)

The first forward builds W and hands out a detached copy that collects the sum in brackets;
:meth:`SharedBuild.flush` carries it through the build once. A scaled loss (fp16) scales the sum and
so the result.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from reft_kernels.interventions import EditWeights, Intervention, RedWeights

_FLUSH = (
    "call flush() after the last micro-batch's backward, before gradients are clipped and the "
    "optimizer steps"
)


def _too_late(grad: Tensor) -> None:
    raise RuntimeError(
        "a backward came after flush(), discard() or a change of the parameters since its forward; "
        + _FLUSH
    )


def _refuse_unready(ddp: DistributedDataParallel) -> None:
    """These settings decide what takes part in a reduction by the main backward alone, which the
    parameters have no part in.
    """
    for name in ("find_unused_parameters", "static_graph"):
        if getattr(ddp, name, False):
            raise RuntimeError(
                f"{name}: got True, expected False: gradients arrive in flush(), after the main "
                "backward"
            )


class _Held:
    """One stack's build: the built weights with their graph, and leaves ``[L, ...]`` in their
    place.
    """

    def __init__(self, stack: Intervention) -> None:
        self.stack = stack
        # taken before the build: the optimizer's own tensors, not those that an engine gathers for
        # the module's call
        self.parameters = list(stack.parameters())
        self._state = self._read()
        self.built = stack()  # a module call, so that engines which gather parameters around one do
        self.leaves = [
            torch.stack([t.detach() for t in column]).requires_grad_(column[0].requires_grad)
            if isinstance(column[0], Tensor)
            else column
            for column in zip(*self.built, strict=True)
        ]

    def _read(self) -> list[tuple[int, bool]]:
        return [(p._version, p.requires_grad) for p in self.parameters]

    def _gathering(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    @property
    def waiting(self) -> bool:
        """Gradients have arrived that the parameters do not have yet."""
        return any(leaf.grad is not None for leaf in self._gathering())

    @property
    def changed(self) -> bool:
        """A parameter was written or frozen since the build."""
        return self._read() != self._state

    @property
    def taken_away(self) -> bool:
        """What was built from was gathered by an enclosing unit, which shards it again between
        forward and flush.
        """
        pairs = zip(self.parameters, self.stack.parameters(), strict=True)
        return any(
            hasattr(now, "full_tensor") and not hasattr(then, "full_tensor") for then, now in pairs
        )

    def hand_out(self) -> list[EditWeights] | list[RedWeights]:
        # unbind: its backward is one stack for all layers, so a micro-batch adds once to each leaf
        columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        kind = type(self.built[0])
        return [kind(*layer) for layer in zip(*columns, strict=True)]

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Built weights and the gradients that gathered for them."""
        outputs, grads = [], []
        for field, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                outputs += [layer[field] for layer in self.built]
                grads += leaf.grad.unbind(0)
        return outputs, grads

    def retire(self) -> None:
        """Refuse gradients from now on: nobody would carry them to the parameters."""
        for leaf in self._gathering():
            leaf.grad = None
            leaf.register_hook(_too_late)


class SharedBuild:
    """Builds each stack once for all forwards of an optimizer step; open from its construction
    until :meth:`close`.

    Until :meth:`flush` the stacks' parameters get no gradient. So flush before anything looks at
    gradients: unscaling, clipping, the optimizer. Forwards without gradients, or of frozen stacks,
    build as ever, and so does what ``torch.compile``
    traces: its gradients reach the parameters in its own backward, and flush has nothing to add.

    Under ``DistributedDataParallel`` the reduction of the stacks' gradients happens in flush;
    ``find_unused_parameters`` and ``static_graph`` must be off. Under FSDP2 the stack must be a
    unit of its own. Engines that reduce at the end of their own ``backward()`` (DeepSpeed) would
    miss what flush brings; do not use it there.

    As a context manager it closes at the end, and after an exception drops what waits.
    """

    def __init__(self) -> None:
        self.closed = False
        self._held: dict[nn.Module, _Held] = {}
        itself = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            shared = itself()
            if shared is not None:
                shared._refuse_step(optimizer)

        # parameters without .grad are skipped by optimizers, so a forgotten flush leaves no other
        # trace
        self._handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, self._handle.remove)

    def __getstate__(self) -> dict:
        raise TypeError(
            "SharedBuild cannot be copied or pickled: it holds a graph; copy the model, whose "
            "copy builds as ever"
        )

    def serves(self) -> bool:
        """Whether a forward that begins now takes part, if its stack is trained."""
        return not torch.compiler.is_compiling() and torch.is_grad_enabled() and not self.closed

    def weights(self, stack: Intervention) -> list[EditWeights] | list[RedWeights]:
        """What ``stack()`` returns, from the step's one build where this forward will be trained.

        Raises:
            RuntimeError: parameters changed while gradients wait for a flush; or
                ``DistributedDataParallel`` runs the forward with settings under which gradients
                cannot arrive after the main backward.
        """
        if not self.serves() or not any(p.requires_grad for p in stack.parameters()):
            return stack()
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None:
            _refuse_unready(ddp)
        held = self._held.get(stack)
        if held is not None and held.changed:
            self._refuse_changed(held)
            self._held.pop(stack).retire()
            held = None
        if held is None:
            held = self._held[stack] = _Held(stack)
        return held.hand_out()

    @property
    def waiting(self) -> bool:
        """Whether gradients wait for :meth:`flush`."""
        return any(held.waiting for held in self._held.values())

    def flush(self) -> None:
        """One backward through the build: the parameters get the gradients of all forwards since
        the last flush.

        Does nothing where no gradient waits.

        Raises:
            RuntimeError: parameters were changed or frozen since the build, or an engine has taken
                them away.
        """
        ready = [held for held in self._held.values() if held.waiting]
        for held in ready:
            self._refuse_changed(held)
            if held.taken_away:
                raise RuntimeError(
                    "flush(): the parameters belong to a larger FSDP unit and are sharded again; "
                    "fully_shard the stack as a unit of its own"
                )
        outputs, grads = [], []
        for held in ready:
            for all_, some in zip((outputs, grads), held.take(), strict=True):
                all_ += some
            del self._held[held.stack]
            held.retire()
        if outputs:
            torch.autograd.backward(outputs, grads)

    def discard(self) -> None:
        """Drop the build and what waits, as zeroing gradients does: a step that is given up."""
        for held in self._held.values():
            held.retire()
        self._held.clear()

    def close(self) -> None:
        """Flush what waits and build as ever from now on."""
        if not self.closed:
            self.flush()
            self._stop()

    def _stop(self) -> None:
        self.closed = True
        self._handle.remove()
        self.discard()

    def __enter__(self) -> SharedBuild:
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()

    @staticmethod
    def _refuse_changed(held: _Held) -> None:
        if held.waiting and held.changed:
            raise RuntimeError(
                f"parameters were changed or frozen while gradients for them wait: {_FLUSH} "
                "(discard() gives them up)"
            )

    def _refuse_step(self, optimizer: Optimizer) -> None:
        mine = {id(p) for held in self._held.values() if held.waiting for p in held.parameters}
        if mine and any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"the optimizer steps while gradients for its parameters wait: {_FLUSH}"
            )
