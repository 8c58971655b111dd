"""Combination of ReFT with another PEFT method, such as LoRA, on one model.

All tuners of a model share one dictionary of configurations. ReFT attaches to the innermost model,
below every ``PeftModel``, so that the weights of both methods keep the names under which PEFT saves
and loads them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from reft_kernels.integrations.peft.layer import CONTAINER, ReftLayer
from reft_kernels.integrations.peft.register import REFT

ORDER = (
    "attach LoRA first and ReFT to the result: model = get_peft_model(model, lora_config), then "
    "get_peft_model(model, reft_config, adapter_name='reft')"
)


class AdapterConfigs(dict):
    """A model's configurations by adapter name; accepts only ReFT adapters as additions.

    A tuner of another method that wraps a model with ReFT would save the weights of both methods
    under names that do not load on the base model.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add configurations.

        ``get_peft_model`` calls this if the model already has a tuner.

        Raises:
            ValueError: If a configuration belongs to another method.
        """
        added: dict[str, PeftConfig] = dict(*args, **kwargs)
        for name, config in added.items():
            if config.peft_type != REFT:
                raise ValueError(
                    f"adapter {name!r}: {_method(config)} cannot be attached to a model with ReFT "
                    "adapters, since PEFT would "
                    f"save neither so that it loads again; {ORDER}"
                )
        super().update(added)


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _why_alone(config: PeftConfig) -> str | None:
    """Return why an adapter cannot be combined with ReFT, or None if it can."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "it adds tokens to the sequence, which ReFT's positions do not count"
    if tuner is None or not issubclass(tuner, BaseTuner) or tuner.uses_shared_state:
        return "it keeps weights outside the layers that it adapts"
    if tuner.forward is not BaseTuner.forward:
        return "it changes the model's forward"
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA looks for its invocation tokens in the model's forward"
    return None


def innermost(model: nn.Module) -> nn.Module:
    """Return the model below every ``PeftModel``, to which ReFT attaches.

    Raises:
        ValueError: If the model has an adapter that cannot be combined with ReFT.
    """
    while True:
        configs = getattr(model, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            reason = None if config.peft_type == REFT else _why_alone(config)
            if reason is not None:
                raise ValueError(
                    f"adapter {name!r}: {_method(config)} cannot be combined with ReFT: {reason}"
                )
        if not isinstance(model, PeftModel | PeftMixedModel):
            return model
        model = model.base_model.model


def check_new(configs: Mapping[str, PeftConfig], name: str, config: PeftConfig) -> None:
    """Check that a new adapter does not conflict with adapters of other methods.

    Args:
        configs: The model's current configurations, by adapter name.
        name: Name of the new adapter.
        config: Configuration of the new adapter.

    Raises:
        ValueError: If an adapter of another method has the same name or shares a module in
            ``modules_to_save``.
    """
    other = configs.get(name)
    if other is not None and other.peft_type != REFT:  # PEFT replaces adapters of the same method
        raise ValueError(
            f"adapter_name: {name!r} is already an adapter of this model ({_method(other)}); pass "
            "another name, as in "
            "get_peft_model(model, config, adapter_name='reft') or "
            "PeftModel.from_pretrained(model, folder, adapter_name='reft')"
        )
    for other_name, other in configs.items():
        both = set(getattr(other, "modules_to_save", None) or ()) & set(
            config.modules_to_save or ()
        )
        if other.peft_type != REFT and both:
            raise ValueError(
                f"modules_to_save: {sorted(both)} belong to adapter {other_name!r} "
                f"({_method(other)}) already, and only one adapter can train a module in full; "
                "leave them to that one (for task_type SEQ_CLS or TOKEN_CLS, PEFT adds the head: "
                "leave task_type out of the ReftConfig)"
            )


def share_configs(model: nn.Module, tuner: BaseTuner, wrapped: nn.Module) -> None:
    """Make the model and all its tuners share one :class:`AdapterConfigs`.

    Args:
        model: The innermost model.
        tuner: The ReFT tuner.
        wrapped: The model that was passed to PEFT: the innermost model or a ``PeftModel``.
    """
    if not isinstance(tuner.peft_config, AdapterConfigs):
        tuner.peft_config = AdapterConfigs(tuner.peft_config)
    holder: Any = model
    holder.peft_config = tuner.peft_config
    while isinstance(wrapped, PeftModel | PeftMixedModel):
        wrapped.base_model.peft_config = tuner.peft_config
        wrapped = wrapped.base_model.model


def other_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Return the tuner layers of other methods."""
    return [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)
    ]


def auxiliary(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """Return the wrappers of fully trained modules (``modules_to_save``)."""
    return [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]


def other_active(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Return the active adapters of other methods, in the order of ``configs``."""
    active = {
        name
        for layer in other_layers(model)
        for name in layer.active_adapters
        if name in adapters_of(layer)
    }
    return [name for name, config in configs.items() if name in active and config.peft_type != REFT]


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """Return the names of the adapters that have weights in a tuner layer."""
    return layer._get_available_adapters()


def without_weights(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Return the adapters of other methods in ``configs`` that have no weights in the model."""
    present: set[str] = set()
    for layer in other_layers(model):
        present |= adapters_of(layer)
    for module in auxiliary(model):
        present |= set(module._adapters)
    return [
        name for name, config in configs.items() if config.peft_type != REFT and name not in present
    ]


def set_active(
    model: nn.Module, configs: Mapping[str, PeftConfig], names: Iterable[str], inference_mode: bool
) -> list[str]:
    """Set the active adapters of each method in ``names``; other methods are not changed.

    Args:
        model: The innermost model.
        configs: The configurations of all its adapters, by adapter name.
        names: Names of the adapters to activate.
        inference_mode: Whether to freeze the activated adapters.

    Returns:
        The names of all active adapters, ReFT adapters first.

    Raises:
        ValueError: If a name is not in ``configs``.
    """
    names = list(names)
    unknown = sorted(set(names) - set(configs))
    if unknown:
        raise ValueError(f"adapter_name: got {unknown}, expected names among {list(configs)}")
    methods = {configs[name].peft_type for name in names}
    replaced = {name for name, config in configs.items() if config.peft_type in methods}
    for method in methods:
        kind = PEFT_TYPE_TO_TUNER_MAPPING[method].tuner_layer_cls
        for layer in [m for m in model.modules() if isinstance(m, kind)]:
            layer.set_adapter(
                [n for n in names if configs[n].peft_type == method], inference_mode=inference_mode
            )
    for module in auxiliary(model):
        activated = [name for name in names if name in module._adapters]
        if activated or set(module.active_adapters) & replaced:
            module.set_adapter(activated, inference_mode=inference_mode)
    return all_active(model, configs)


def all_active(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Return the names of all active adapters of a model, ReFT adapters first."""
    reft = {
        n: None
        for m in model.modules()
        if isinstance(m, ReftLayer)
        for n in m.active_adapters
        if n in adapters_of(m)
    }
    return [*reft, *other_active(model, configs)]


def delete_other(model: nn.Module, configs: dict[str, PeftConfig], name: str) -> None:
    """Delete an adapter of another method, as the tuner of that method does."""
    config = configs.pop(name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    delete_adapter(model, name, prefix=prefix, layer_cls=tuner.tuner_layer_cls)


def trainable_of_the_base(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that belong to no adapter."""
    adapters = {
        id(p)
        for m in [*other_layers(model), *auxiliary(model)]
        for n, p in m.named_parameters()
        if not n.startswith(("base_layer.", "original_module."))
    }
    return [
        p
        for n, p in model.named_parameters()
        if p.requires_grad and id(p) not in adapters and not n.startswith(f"{CONTAINER}.")
    ]


def refuse_prompts(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Reject prompt learning methods on a model that has ReFT adapters.

    These methods add virtual tokens to the sequence, which would shift ReFT's positions.

    Args:
        model: The model to which the adapter is added.
        name: Name of the adapter.
        config: Configuration of the adapter.

    Raises:
        ValueError: If ``model`` has ReFT adapters and ``config`` is of a prompt learning method,
            such as prefix tuning, prompt tuning or P-tuning.
    """
    reason = _why_alone(config)
    if reason is None or not (config.is_prompt_learning or config.is_adaption_prompt):
        return
    if any(isinstance(module, ReftLayer) for module in model.modules()):
        raise ValueError(
            f"adapter {name!r}: {_method(config)} cannot be put around a model with ReFT adapters: "
            f"{reason}; train them apart"
        )


def install() -> None:
    """Patch ``PeftModel`` so that it calls :func:`refuse_prompts`.

    The call precedes the construction of a ``PeftModel`` and the addition of an adapter. Further
    calls of this function have no effect.
    """
    if hasattr(PeftModel.add_adapter, "reft_original"):
        return
    made, adding = PeftModel.__init__, PeftModel.add_adapter

    @functools.wraps(made)
    def make(
        self: PeftModel,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        refuse_prompts(model, adapter_name, peft_config)
        made(self, model, peft_config, adapter_name, *args, **kwargs)

    @functools.wraps(adding)
    def add_adapter(
        self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> Any:
        refuse_prompts(self, adapter_name, peft_config)
        return adding(self, adapter_name, peft_config, *args, **kwargs)

    setattr(add_adapter, "reft_original", adding)  # noqa: B010  (mypy rejects the plain assignment)
    PeftModel.__init__, PeftModel.add_adapter = make, add_adapter
