"""Gradient accumulation with one build of R per optimizer step.

By default every forward builds the weights W(theta) of all layers, and every backward
differentiates the build. The gradient is linear in dl/dW, so for micro-batch losses l_1 .. l_k

    d(l_1 + ... + l_k) / d theta = (dW / d theta)^T (dl_1 / dW + ... + dl_k / dW)

The first forward builds W and returns a detached copy whose ``.grad`` accumulates the sum in
parentheses. :meth:`SharedBuild.flush` backpropagates that sum through the build once. A loss scale
(fp16) multiplies the sum and therefore the result.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from reft_kernels.arguments import BuiltWeights

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
    """Raise for DDP settings that require parameter gradients during the main backward."""
    for name in ("find_unused_parameters", "static_graph"):
        if getattr(ddp, name, False):
            raise RuntimeError(
                f"{name}: got True, expected False: gradients arrive in flush(), after the main "
                "backward"
            )


class _StackBuild:
    """The built weights of one stack with their graph, and detached leaves ``[L, ...]``."""

    def __init__(self, stack: Intervention) -> None:
        self.stack = stack
        # read before the build: an engine may swap in gathered tensors during the module call
        self.parameters = list(stack.parameters())
        self._state = self._parameter_state()
        # call the module instead of build(), so that FSDP gathers the parameters
        self.built = stack()
        self.leaves = [
            torch.stack([t.detach() for t in column]).requires_grad_(column[0].requires_grad)
            if isinstance(column[0], Tensor)
            else column
            for column in zip(*self.built, strict=True)
        ]

    def _parameter_state(self) -> list[tuple[int, bool]]:
        return [(p._version, p.requires_grad) for p in self.parameters]

    def _trained_leaves(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    @property
    def waiting(self) -> bool:
        """Whether the leaves have gradients that were not flushed to the parameters."""
        return any(leaf.grad is not None for leaf in self._trained_leaves())

    @property
    def changed(self) -> bool:
        """Whether a parameter was written or frozen since the build."""
        return self._parameter_state() != self._state

    @property
    def resharded(self) -> bool:
        """Whether an enclosing FSDP unit has resharded the parameters since the build."""
        pairs = zip(self.parameters, self.stack.parameters(), strict=True)
        return any(
            hasattr(current, "full_tensor") and not hasattr(built_from, "full_tensor")
            for built_from, current in pairs
        )

    def layer_weights(self) -> list[EditWeights] | list[RedWeights]:
        """Weights of each layer, as views of the leaves."""
        # unbind's backward is one stack() for all layers: one addition per leaf and micro-batch
        columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        kind: Any = type(self.built[0])
        layers = [kind(*layer) for layer in zip(*columns, strict=True)]
        for layer, built in zip(layers, self.built, strict=True):
            if isinstance(built, BuiltWeights):  # of equal values
                layer.rounded = built.rounded
        return layers

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Built weights that have a gradient, and these gradients."""
        outputs: list[Any] = []
        grads: list[Tensor] = []
        for field, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                outputs += [layer[field] for layer in self.built]
                grads += leaf.grad.unbind(0)
        return outputs, grads

    def retire(self) -> None:
        """Make later backwards to the leaves raise: their gradients would be lost."""
        for leaf in self._trained_leaves():
            leaf.grad = None
            leaf.register_hook(_too_late)


class SharedBuild:
    """Builds each stack once for all forwards of an optimizer step.

    Active from construction until :meth:`close`. The stacks' parameters have no gradient until
    :meth:`flush`, so call it before unscaling, clipping and the optimizer step. Forwards without
    gradients or with frozen stacks build their own weights. So do forwards that ``torch.compile``
    traces: their backward writes the parameters' gradients directly.

    Under ``DistributedDataParallel``, :meth:`flush` reduces the stacks' gradients;
    ``find_unused_parameters`` and ``static_graph`` must be off. Under FSDP2, the stack must be an
    FSDP unit of its own. Not supported with engines that reduce gradients at the end of their own
    ``backward()``, such as DeepSpeed.

    As a context manager, closes on exit; after an exception, discards unflushed gradients.
    """

    def __init__(self) -> None:
        self.closed = False
        self._builds: dict[nn.Module, _StackBuild] = {}
        self_ref = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            shared = self_ref()
            if shared is not None:
                shared._refuse_step(optimizer)

        # optimizers skip parameters without .grad, so a missing flush would go unnoticed
        self._handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, self._handle.remove)

    def __getstate__(self) -> dict:
        raise TypeError(
            "SharedBuild cannot be copied or pickled: it holds a graph; copy the model, whose "
            "copy builds as ever"
        )

    def serves(self) -> bool:
        """Whether a forward that starts now uses the shared build, if its stack is trained."""
        return not torch.compiler.is_compiling() and torch.is_grad_enabled() and not self.closed

    def weights(self, stack: Intervention) -> list[EditWeights] | list[RedWeights]:
        """Weights of each layer, as ``stack()`` returns them.

        Taken from the shared build if the stack is trained and :meth:`serves` is true.

        Raises:
            RuntimeError: parameters changed before their gradients were flushed, or
                ``DistributedDataParallel`` runs the forward with ``find_unused_parameters`` or
                ``static_graph``.
        """
        if not self.serves() or not any(p.requires_grad for p in stack.parameters()):
            return stack()
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None:
            _refuse_unready(ddp)
        build = self._builds.get(stack)
        if build is not None and build.changed:
            self._refuse_changed(build)
            self._builds.pop(stack).retire()
            build = None
        if build is None:
            build = self._builds[stack] = _StackBuild(stack)
        return build.layer_weights()

    @property
    def waiting(self) -> bool:
        """Whether there are gradients to :meth:`flush`."""
        return any(build.waiting for build in self._builds.values())

    def flush(self) -> None:
        """Backpropagate the gradients of all forwards since the last flush to the parameters.

        Runs one backward through the build. Does nothing if there are no gradients.

        Raises:
            RuntimeError: parameters were changed or frozen since the build, or FSDP has resharded
                them.
        """
        ready = [build for build in self._builds.values() if build.waiting]
        for build in ready:
            self._refuse_changed(build)
            if build.resharded:
                raise RuntimeError(
                    "flush(): the parameters belong to a larger FSDP unit and are sharded again; "
                    "fully_shard the stack as a unit of its own"
                )
        outputs: list[Tensor] = []
        grads: list[Tensor] = []
        for build in ready:
            build_outputs, build_grads = build.gradients()
            outputs += build_outputs
            grads += build_grads
            del self._builds[build.stack]
            build.retire()
        if outputs:
            torch.autograd.backward(outputs, grads)

    def discard(self) -> None:
        """Drop the build and its gradients, to skip a step; like zeroing gradients."""
        for build in self._builds.values():
            build.retire()
        self._builds.clear()

    def close(self) -> None:
        """Flush, then let every forward build its own weights again."""
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
    def _refuse_changed(build: _StackBuild) -> None:
        if build.waiting and build.changed:
            raise RuntimeError(
                f"parameters were changed or frozen while gradients for them wait: {_FLUSH} "
                "(discard() gives them up)"
            )

    def _refuse_step(self, optimizer: Optimizer) -> None:
        waiting = {
            id(p) for build in self._builds.values() if build.waiting for p in build.parameters
        }
        stepped = (p for group in optimizer.param_groups for p in group["params"])
        if waiting and any(id(p) in waiting for p in stepped):
            raise RuntimeError(
                f"the optimizer steps while gradients for its parameters wait: {_FLUSH}"
            )
