"""Editing a whole model: its components, the rows of a batch, the hooks, generation. Torch
alone, whatever the framework.
"""

from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.call_state import EXPLICIT
from reft_kernels.model.components import ROLES, Component, Target, find_blocks, resolve
from reft_kernels.model.editor import BASE, Editor

__all__ = [
    "BASE",
    "EXPLICIT",
    "ROLES",
    "Component",
    "Editor",
    "SharedBuild",
    "Target",
    "find_blocks",
    "resolve",
]
