"""The PEFT tuner: adds, loads, switches and removes ReFT adapters of a model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from reft_kernels import base_model
from reft_kernels.integrations.peft import combining, saving
from reft_kernels.integrations.peft.config import ReftConfig
from reft_kernels.integrations.peft.layer import (
    CONTAINER,
    AdapterContainer,
    ReftLayer,
    container_of,
    device_of,
    find_container,
)
from reft_kernels.integrations.peft.register import PREFIX, REFT
from reft_kernels.interventions import STACKED, Intervention
from reft_kernels.model import BASE, Component, Editor, resolve
from reft_kernels.model.merging import Place, check_mergeable, merge_adapter
from reft_kernels.model.modalities import counted_tokens

_TOKEN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _labels_follow_the_prompt(model: nn.Module, config: ReftConfig) -> bool:
    """Whether labels ``[B, T]`` continue a prompt, as for generating models.

    False for models with a label for every token, such as taggers.
    """
    if config.task_type is not None:
        return str(getattr(config.task_type, "value", config.task_type)) in _TOKEN_TASKS
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else True


def _check_template(model: nn.Module, config: ReftConfig, component: Component) -> None:
    """Check that a response template can occur in the prompts of a model.

    Raises:
        ValueError: the model is an encoder-decoder model, whose prompt is the encoder's input, or a
            token id is not in the vocabulary.
    """
    if config.response_template is None:
        return
    if component.encoder or component.decoder:
        raise ValueError(
            "response_template: got one for an encoder-decoder model, expected None: its prompt "
            "is the encoder's input"
        )
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if callable(get_embeddings) else None
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
    """One stacked intervention per width; the layers of a stack are in the targets' order."""
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
    """Add an adapter's stacks and hooks, and the container if there is none."""
    counted = counted_tokens(model, config.spec, component)  # before the model is changed
    container = container_of(model)
    if container is None:
        container = AdapterContainer(
            Editor(model, token_labels=_labels_follow_the_prompt(model, config))
        )
        container.frozen = combining.trainable_of_the_base(model)
        container.train(model.training)
        model.add_module(CONTAINER, container)
    for width, stack in stacks.items():
        container.layer(width).reft_stack[name] = stack.train(model.training)
    container.editor.add(name, component, config.rule._replace(counted=counted), stacks)


def _detach(model: nn.Module, name: str) -> None:
    """Remove an adapter's stacks and hooks, and the container with the last adapter."""
    container = container_of(model)
    if container is None:
        return
    container.editor.remove(name)
    container.drop(name)
    if not container.editor.adapters:
        del model._modules[CONTAINER]


def _set_base_trainable(container: AdapterContainer, trainable: bool) -> None:
    """Freeze or unfreeze the parameters that were trainable before the first adapter."""
    for parameter in container.frozen:
        parameter.requires_grad_(trainable)


def _note_base(model: nn.Module, name: str, config: ReftConfig) -> None:
    """Put the model's fingerprint into a configuration; warn if its file has another model's."""
    # here and not when saving: FSDP flattens the weights in between
    current = base_model.of_model(model, without=(CONTAINER,))
    if config.awaits_weights and config.base_fingerprint is not None:
        theirs, here = base_model.from_json(config.base_fingerprint).differences(current)
        if theirs:
            warnings.warn(
                f"adapter {name!r} was trained on another base model: it has {', '.join(theirs)}, "
                f"and this one {', '.join(here)}",
                stacklevel=2,
            )
    config.base_fingerprint = current.to_json()


class ReftTuner(BaseTuner):
    """The ReFT tuner.

    Adds a child module with the stacked parameters and hooks that apply the edits; the modules of
    the model are not replaced. Adapters of another method on the model, such as LoRA, stay active
    and trainable; see :mod:`reft_kernels.integrations.peft.combining`.

    Args:
        model: the model, which may be a ``PeftModel`` with adapters of another method.
        peft_config: the configuration, or configurations by adapter name.
        adapter_name: name of the adapter.
        **kwargs: arguments of ``BaseTuner``.

    Raises:
        ValueError: an adapter of another method has the name or cannot be combined with ReFT.
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
        previous = dict(getattr(inner, "peft_config", None) or {})
        combining.check_new(previous, adapter_name, config)
        try:
            super().__init__(inner, peft_config, adapter_name, **kwargs)
        except Exception:
            if previous:  # undo PEFT's change of the model's table of configurations
                configs: Any = inner.peft_config
                del configs[adapter_name]
                configs |= {n: c for n, c in previous.items() if n == adapter_name}
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
        """Add the adapter ``adapter_name`` of ``self.peft_config``; on errors, undo all changes.

        Args:
            model: the innermost model.
            adapter_name: name of the adapter.
            autocast_adapter_dtype: see PEFT.
            low_cpu_mem_usage: whether to create the parameters on the meta device.
            state_dict: not used.

        Raises:
            ValueError: the model does not have the component or layers, or the intervention does
                not support an argument of the configuration.
            TypeError: an argument of the configuration has a wrong type.
        """
        config = self.peft_config[adapter_name]
        if config.awaits_weights:
            saving.check_weights(config)
        combining.check_new(
            {n: c for n, c in self.peft_config.items() if n != adapter_name}, adapter_name, config
        )
        component = resolve(model, config.component, config.layers, embed_dim=config.embed_dim)
        _check_template(model, config, component)
        device = torch.device("meta") if low_cpu_mem_usage else device_of(model)
        first = container_of(model) is None
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
            container = container_of(model)
            _detach(model, adapter_name)
            if first and container is not None:
                _set_base_trainable(container, True)
            raise
        _note_base(model, adapter_name, config)
        # PEFT does not freeze a model that has tuner layers, and _attach has added them
        container = container_of(model)
        if first and container is not None:
            _set_base_trainable(container, False)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("ReFT replaces no module; its configuration matches none")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters of a method; adapters of other methods are not changed.

        Args:
            adapter_name: name or names of the adapters.
            inference_mode: whether to freeze them.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if not combining.other_layers(self.model):
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            self.active_adapter = combining.set_active(
                self.model, self.peft_config, names, inference_mode
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter of this or another method.

        Deleting the last ReFT adapter removes all hooks and modules that were added.
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
        container = container_of(self.model)
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
        places: dict[str, list[Place]] = {}
        for name in names:
            config = self.peft_config[name]
            component = resolve(
                self.model, config.component, config.layers, embed_dim=config.embed_dim
            )
            stacks = container.stacks(name)
            counts = dict.fromkeys(stacks, 0)
            places[name] = []
            for target in component.targets:
                index = counts[target.embed_dim]
                counts[target.embed_dim] += 1
                places[name].append((target, stacks[target.embed_dim], index))
        for name in names:  # check all before merging any
            check_mergeable(name, self.model, places[name], self.peft_config[name].spec)
        for name in names:
            merge_adapter(self.model, places[name], safe)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Handle the argument ``adapter_names`` of a call: a batch with several adapters.

        ``adapter_names`` has one name per example; "__base__" means no adapter. In training, an
        adapter of the batch gets the gradient of its own examples, if it is trainable.

        Raises:
            ValueError: unknown names; or the model has adapters of another method or
                ``modules_to_save``.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if combining.other_layers(self.model):
            raise ValueError(
                "adapter_names: not supported for a model with adapters of another method; use "
                "set_adapter"
            )
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(
                f"adapter_names: got {unknown}, expected names among {[*self.peft_config, BASE]}"
            )
        if any(config.modules_to_save for config in self.peft_config.values()):
            raise ValueError("adapter_names: adapters with modules_to_save cannot share a batch")
        container = container_of(self.model)
        assert container is not None, "a model without ReFT adapters"
        state = container.editor.state
        named = container.editor.members_of(names, device_of(self.model))
        outer_members, state.members = state.members, named
        try:
            yield
        finally:
            state.members = outer_members

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: ReftConfig, adapter_name: str, **kwargs: Any
    ) -> dict:
        """The state dict of an adapter, as PEFT saves it.

        Raises:
            ValueError: see :func:`reft_kernels.integrations.peft.saving.check_complete`.
        """
        saving.check_complete(model, adapter_name)
        if config.base_fingerprint is not None:  # the vocabulary may have grown since
            config.base_fingerprint = base_model.resized(config.base_fingerprint, model)
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
        """Convert a file's keys to the model's, and check them before anything is loaded.

        Raises:
            ValueError: keys are missing or unexpected, or a weight has another shape. An adapter
                that was created for the file is removed from the model.
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        problem = _why_unfit(model, adapter_name, remapped)
        if problem is None:
            config.awaits_weights = False
            return remapped
        if config.awaits_weights:
            _undo_injection(model, adapter_name)
        raise ValueError(f"adapter {adapter_name!r}: {problem}")


def _why_unfit(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> str | None:
    """The reason why a file's weights do not fit an adapter of the model, or None."""
    found = find_container(model)
    path = CONTAINER if found is None else found[0]
    in_model = model.state_dict()
    in_file = {
        (k if k in in_model else k.removeprefix("base_model.model.")): v
        for k, v in state_dict.items()
    }
    expected = {
        k for k in in_model if k.startswith(f"{path}.") and f".reft_stack.{adapter_name}." in k
    }
    missing, foreign = sorted(expected - in_file.keys()), sorted(in_file.keys() - in_model.keys())
    reshaped = [
        f"{k} is {tuple(v.shape)}, expected {tuple(in_model[k].shape)}"
        for k, v in in_file.items()
        if k in expected and in_model[k].numel() and in_model[k].shape != v.shape
    ]
    parts = []
    if missing:
        parts.append(f"the file lacks {missing}")
    if foreign:
        parts.append(f"the file has foreign keys {foreign}")
    if reshaped:
        parts.append(
            "the file's rank, layers or width differ from the configuration's: "
            f"{'; '.join(reshaped)}"
        )
    return "; ".join(parts) or None


def _undo_injection(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter whose weights do not fit."""
    found = find_container(model)
    tuner = getattr(model, "base_model", None)
    if found is None or not isinstance(tuner, ReftTuner):
        return
    _, container = found
    if set(container.editor.adapters) == {adapter_name}:
        tuner.unload()
        _set_base_trainable(container, True)
    else:
        tuner.delete_adapter(adapter_name)
