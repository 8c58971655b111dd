"""The tuner: adds, loads, switches and removes ReFT adapters on a model, through PEFT's own
interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from reft_kernels.integrations.peft import combining, saving
from reft_kernels.integrations.peft.config import ReftConfig
from reft_kernels.integrations.peft.layer import (
    CONTAINER,
    AdapterContainer,
    ReftLayer,
    _device_of,
    find_container,
)
from reft_kernels.integrations.peft.register import PREFIX, REFT
from reft_kernels.interventions import STACKED, Intervention
from reft_kernels.model import BASE, Component, Editor, resolve
from reft_kernels.model.merging import check_mergeable, merge_adapter

_TOKEN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _labels_follow_the_prompt(model: nn.Module, config: ReftConfig) -> bool:
    """Whether labels ``[B, T]`` continue a prompt, as a generating model's do, or stand at every
    token, as a tagger's do.
    """
    if config.task_type is not None:
        return str(getattr(config.task_type, "value", config.task_type)) in _TOKEN_TASKS
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else True


def _check_template(model: nn.Module, config: ReftConfig, component: Component) -> None:
    """Refuse a response template that a model can never contain.

    Raises:
        ValueError: an encoder-decoder model, whose prompts are its encoder's input; a token id
            beyond the vocabulary.
    """
    if config.response_template is None:
        return
    if component.encoder or component.decoder:
        raise ValueError(
            "response_template: got one for an encoder-decoder model, expected None: its prompt "
            "is the encoder's input"
        )
    embedding = (
        model.get_input_embeddings()
        if callable(getattr(model, "get_input_embeddings", None))
        else None
    )
    size = getattr(embedding, "num_embeddings", None)
    largest = max(max(ids) for ids in config.response_template)
    if size is not None and largest >= size:
        raise ValueError(
            f"response_template: got token id {largest}, expected ids below {size}, the model's "
            "vocabulary"
        )


def _make_stacks(
    config: ReftConfig, component: Component, device: torch.device
) -> dict[int, Intervention]:
    """One stacked intervention for each width among the targets; targets of a width are stacked
    in order.
    """
    counts: dict[int, int] = {}
    for target in component.targets:
        counts[target.embed_dim] = counts.get(target.embed_dim, 0) + 1
    rank = 1 if config.intervention == "red" else config.rank
    return {
        width: STACKED[config.intervention](
            count,
            width,
            rank,
            activation=config.activation,
            dropout=config.dropout,
            parametrization=config.parametrization,
            init=config.init,
            num_sets=None if config.share_weights else 2,
            device=device,
        )
        for width, count in counts.items()
    }


def _attach(
    model: nn.Module,
    name: str,
    config: ReftConfig,
    component: Component,
    stacks: dict[int, Intervention],
) -> None:
    container = model._modules.get(CONTAINER)
    if container is None:
        container = AdapterContainer(
            Editor(model, token_labels=_labels_follow_the_prompt(model, config))
        )
        container.frozen = combining.trainable_of_the_base(model)
        container.train(model.training)
        model.add_module(CONTAINER, container)
    for width, stack in stacks.items():
        container.layer(width).reft_stack[name] = stack.train(model.training)
    container.editor.add(name, component, config.rule, stacks)


def _detach(model: nn.Module, name: str) -> None:
    """Take one adapter out; with the last one everything goes that was added."""
    container = model._modules.get(CONTAINER)
    if container is None:
        return
    container.editor.remove(name)
    container.drop(name)
    if not container.editor.adapters:
        del model._modules[CONTAINER]


def _set_trainable(container: AdapterContainer, trainable: bool) -> None:
    """Freeze what was trainable before the first adapter came, or make it so again."""
    for parameter in container.frozen:
        parameter.requires_grad_(trainable)


class ReftTuner(BaseTuner):
    """ReFT on a model: a child module holds the stacked parameters, hooks apply the edits, the
    model itself is untouched.

    On a model with adapters of another method, such as LoRA, both stay active and trainable: see
    :mod:`reft_kernels.integrations.peft.combining`.

    Raises:
        ValueError: an adapter of that name is there already, or one that cannot be combined with
            ReFT.
    """

    prefix = PREFIX
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: ReftConfig | dict[str, ReftConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        inner = combining.innermost(model)
        config = peft_config if isinstance(peft_config, ReftConfig) else peft_config[adapter_name]
        known = dict(getattr(inner, "peft_config", None) or {})
        combining.check_new(known, adapter_name, config)
        try:
            super().__init__(inner, peft_config, adapter_name, **kwargs)
        except Exception:
            if known:  # PEFT has put the configuration into the model's table
                del inner.peft_config[adapter_name]
                inner.peft_config |= {n: c for n, c in known.items() if n == adapter_name}
            raise
        combining.share_configs(inner, self, model)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the adapter that ``self.peft_config[adapter_name]`` describes; on any error the model
        is as it was.

        Raises:
            ValueError, TypeError: a component, layers or an initialisation that this model or
                intervention does not have.
        """
        config = self.peft_config[adapter_name]
        if config.awaits_weights:
            saving.check_weights(config)
        combining.check_new(
            {n: c for n, c in self.peft_config.items() if n != adapter_name}, adapter_name, config
        )
        component = resolve(model, config.component, config.layers, embed_dim=config.embed_dim)
        _check_template(model, config, component)
        device = torch.device("meta") if low_cpu_mem_usage else _device_of(model)
        first = CONTAINER not in model._modules
        stacks = _make_stacks(config, component, device)
        _attach(model, adapter_name, config, component, stacks)
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        except Exception:
            container = model._modules[CONTAINER]
            _detach(model, adapter_name)
            if first:
                _set_trainable(container, True)
            raise
        # PEFT leaves trainable what was so when it finds tuner layers there already, as ours are by
        # now
        if first:
            _set_trainable(model._modules[CONTAINER], False)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("ReFT replaces no module; its configuration matches none")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active in place of those of the same method; adapters of other methods
        stay as they are.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not combining.other_layers(self.model):
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            self.active_adapter = combining.set_active(
                self.model, self.peft_config, names, inference_mode
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, of this method or another; with the last of this one no hook or
        module of ours is left.
        """
        config = self.peft_config.get(adapter_name)
        if config is not None and config.peft_type != REFT:
            combining.delete_other(self.model, self.peft_config, adapter_name)
        else:
            super().delete_adapter(adapter_name)
            _detach(self.model, adapter_name)
        if combining.other_layers(self.model):
            self.active_adapter = combining.all_active(self.model, self.peft_config)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        container = self.model._modules.get(CONTAINER)
        if container is not None:
            if merge:
                names = self.active_adapters if adapter_names is None else adapter_names
                self._merge(
                    container,
                    [n for n in names if self.peft_config[n].peft_type == REFT],
                    safe_merge,
                )
            for name in list(container.editor.adapters):
                _detach(self.model, name)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _merge(self, container: AdapterContainer, names: list[str], safe: bool) -> None:
        places = {}
        for name in names:
            config = self.peft_config[name]
            component = resolve(
                self.model, config.component, config.layers, embed_dim=config.embed_dim
            )
            stacks, counts = container.stacks(name), dict.fromkeys(container.stacks(name), 0)
            places[name] = []
            for target in component.targets:
                index = counts[target.embed_dim]
                counts[target.embed_dim] += 1
                places[name].append((target, stacks[target.embed_dim], index))
        for name in names:  # all are looked at before any is merged
            check_mergeable(name, self.model, places[name], self.peft_config[name].spec)
        for name in names:
            merge_adapter(self.model, places[name], safe)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """``adapter_names=[...]``, one for each example ("__base__" for none): several tasks in
        one batch.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if combining.other_layers(self.model):
            raise ValueError(
                "adapter_names: a model with adapters of another method beside ReFT serves one "
                "choice at a time"
            )
        container = self.model._modules[CONTAINER]
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names: got {unknown}, expected names among {[*self.peft_config, BASE]}"
            )
        if self.training:
            raise ValueError(
                "adapter_names: several adapters in a batch serve inference; call model.eval() "
                "first"
            )
        if any(config.modules_to_save for config in self.peft_config.values()):
            raise ValueError("adapter_names: adapters with modules_to_save cannot share a batch")
        state = container.editor.state
        before, state.members = state.members, tuple(names)
        try:
            yield
        finally:
            state.members = before

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: ReftConfig, adapter_name: str, **kwargs: Any
    ) -> dict:
        """As PEFT's, refusing to save a model of which another adapter's weights would be lost.

        Raises:
            ValueError: an adapter of another method has no layers any more, or a tuner stands
                around ReFT's model.
        """
        saving.check_complete(model, adapter_name)
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **kwargs
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: ReftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Fit a file's keys to the model, refusing a file that does not fit before anything is
        loaded.

        Raises:
            ValueError: keys that are missing or foreign, or weights of another shape; an adapter
                that was waiting for them is taken out of the model again.
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        problem = _why_unfit(model, adapter_name, remapped)
        if problem is None:
            config.awaits_weights = False
            return remapped
        if config.awaits_weights:
            _take_back(model, adapter_name)
        raise ValueError(f"adapter {adapter_name!r}: {problem}")


def _why_unfit(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> str | None:
    path, _ = find_container(model)
    known = model.state_dict()
    given = {
        (k if k in known else k.removeprefix("base_model.model.")): v for k, v in state_dict.items()
    }
    expected = {
        k for k in known if k.startswith(f"{path}.") and f".reft_stack.{adapter_name}." in k
    }
    missing, foreign = sorted(expected - given.keys()), sorted(given.keys() - known.keys())
    other = [
        f"{k} is {tuple(v.shape)}, expected {tuple(known[k].shape)}"
        for k, v in given.items()
        if k in expected and known[k].numel() and known[k].shape != v.shape
    ]
    parts = []
    if missing:
        parts.append(f"the file lacks {missing}")
    if foreign:
        parts.append(f"the file has foreign keys {foreign}")
    if other:
        parts.append(
            f"the file's rank, layers or width differ from the configuration's: {'; '.join(other)}"
        )
    return "; ".join(parts) or None


def _take_back(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of an adapter whose weights turned out not to fit."""
    _, container = find_container(model)
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, ReftTuner):
        return
    if set(container.editor.adapters) == {adapter_name}:
        tuner.unload()
        _set_trainable(container, True)
    else:
        tuner.delete_adapter(adapter_name)
