"""ReFT on a model that has adapters of another method, such as LoRA: what may be combined, and
which adapters are whose.

PEFT keeps one table of configurations for a model, shared by every tuner on it. ReFT attaches to
the model itself, under any ``PeftModel``, so that both methods' weights keep the names under which
PEFT saves and loads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    """A model's configurations by adapter name, refusing a tuner of another method around a ReFT
    model.

    Such a tuner would save its weights, and ReFT's, under names that do not load on the model
    alone.
    """

    def update(self, other: Mapping[str, PeftConfig]) -> None:
        """Add configurations, as a tuner does that ``get_peft_model`` wraps around the model.

        Raises:
            ValueError: one of them is of another method.
        """
        for name, config in other.items():
            if config.peft_type != REFT:
                raise ValueError(
                    f"adapter {name!r}: {_method(config)} cannot be attached to a model with ReFT "
                    "adapters, since PEFT would "
                    f"save neither so that it loads again; {ORDER}"
                )
        super().update(other)


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _why_alone(config: PeftConfig) -> str | None:
    """Why an adapter cannot be combined with ReFT, or None."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "it puts tokens of its own into the sequence, which ReFT's positions do not count"
    if tuner is None or not issubclass(tuner, BaseTuner) or tuner.uses_shared_state:
        return "it keeps weights outside the layers that it adapts"
    if tuner.forward is not BaseTuner.forward:
        return "it changes the model's forward"
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA looks for its invocation tokens in the model's forward"
    return None


def innermost(model: nn.Module) -> nn.Module:
    """The model under every ``PeftModel`` around it, to which ReFT attaches.

    Raises:
        ValueError: an adapter on it cannot be combined with ReFT.
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
    """Refuse an adapter that would take the place of another method's.

    Args:
        configs: what the model has already.

    Raises:
        ValueError: the name is another method's, or both train the same module in full.
    """
    other = configs.get(name)
    if other is not None and other.peft_type != REFT:  # ReFT's own is replaced, as PEFT does
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
                f"({_method(other)}) already, and only one "
                "adapter can train a module in full; leave them to that one (with a task_type of "
                "SEQ_CLS or TOKEN_CLS PEFT "
                "adds the head by itself: leave task_type out of the ReftConfig)"
            )


def share_configs(model: nn.Module, tuner: BaseTuner, wrapped: nn.Module) -> None:
    """Give the model and every tuner on it one :class:`AdapterConfigs`.

    Args:
        wrapped: what was passed as the model: the model itself or a ``PeftModel`` around it.
    """
    if not isinstance(tuner.peft_config, AdapterConfigs):
        tuner.peft_config = AdapterConfigs(tuner.peft_config)
    model.peft_config = tuner.peft_config
    while isinstance(wrapped, PeftModel | PeftMixedModel):
        wrapped.base_model.peft_config = tuner.peft_config
        wrapped = wrapped.base_model.model


def other_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The tuner layers of other methods."""
    return [
        m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)
    ]


def auxiliary(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """The modules that adapters train in full (``modules_to_save``)."""
    return [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]


def other_active(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """The active adapters of other methods, in the order of ``configs``."""
    active = {
        name
        for layer in other_layers(model)
        for name in layer.active_adapters
        if name in held(layer)
    }
    return [name for name, config in configs.items() if name in active and config.peft_type != REFT]


def held(layer: BaseTunerLayer) -> set[str]:
    """The adapters of which a tuner layer holds weights."""
    return layer._get_available_adapters()


def without_weights(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Adapters in ``configs`` of other methods that no layer of the model holds any more."""
    found: set[str] = set()
    for layer in other_layers(model):
        found |= held(layer)
    for module in auxiliary(model):
        found |= set(module._adapters)
    return [
        name for name, config in configs.items() if config.peft_type != REFT and name not in found
    ]


def set_active(
    model: nn.Module, configs: Mapping[str, PeftConfig], names: Iterable[str], inference_mode: bool
) -> list[str]:
    """Make adapters active, each in place of its own method's; other methods keep theirs.

    Returns:
        Every active adapter, ReFT's first.

    Raises:
        ValueError: a name that the model does not have.
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
        mine = [name for name in names if name in module._adapters]
        if mine or set(module.active_adapters) & replaced:
            module.set_adapter(mine, inference_mode=inference_mode)
    return all_active(model, configs)


def all_active(model: nn.Module, configs: Mapping[str, PeftConfig]) -> list[str]:
    """Every active adapter of a model, ReFT's first."""
    reft = {
        n: None
        for m in model.modules()
        if isinstance(m, ReftLayer)
        for n in m.active_adapters
        if n in held(m)
    }
    return [*reft, *other_active(model, configs)]


def delete_other(model: nn.Module, configs: dict[str, PeftConfig], name: str) -> None:
    """Delete an adapter of another method, as that method's tuner does."""
    config = configs.pop(name)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    delete_adapter(model, name, prefix=prefix, layer_cls=tuner.tuner_layer_cls)


def trainable_of_the_base(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters that belong to no adapter."""
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
