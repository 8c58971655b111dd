"""Imports all catalogues, so that ``FAMILIES`` is complete."""

from __future__ import annotations

from tests.families import (  # noqa: F401
    catalogue_encoders,
    catalogue_fused,
    catalogue_more,
    catalogue_other,
    catalogue_recent,
    catalogue_text,
    catalogue_vlm,
)
from tests.families.family import FAMILIES

__all__ = ["FAMILIES"]
