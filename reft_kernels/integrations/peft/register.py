"""Adds the method to PEFT's enum ``PeftType`` at run time and registers it."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "reft"
PREFIX = "reft_"


def _member(value: str) -> PeftType:
    """The member of ``PeftType`` with this name and value; added if it is missing."""
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, value, member)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    return member


REFT = _member(NAME.upper())


def register(config_class: type, tuner_class: type) -> None:
    """Register the method with PEFT, once.

    Args:
        config_class: the configuration class.
        tuner_class: the tuner class.

    Raises:
        ImportError: PEFT has another method of the same name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(REFT)
    if registered is None:
        register_peft_method(
            name=NAME, config_cls=config_class, model_cls=tuner_class, prefix=PREFIX
        )
    elif registered is not config_class:
        raise ImportError(
            f"PEFT has another method called {NAME!r} ({registered.__module__}); reft_kernels "
            "cannot register its own"
        )
