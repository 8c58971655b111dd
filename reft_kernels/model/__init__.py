"""Interventions on a whole model: components, rows of a batch, hooks and generation.

Depends on torch only; the integrations with other libraries build on it.
"""

from reft_kernels.model.accumulation import SharedBuild
from reft_kernels.model.components import ROLES, Component, Target, find_blocks, resolve
from reft_kernels.model.editor import Editor
from reft_kernels.model.members import BASE
from reft_kernels.model.model_call import EXPLICIT
from reft_kernels.model.supervised_logits import SupervisedLogits

__all__ = [
    "BASE",
    "EXPLICIT",
    "ROLES",
    "Component",
    "Editor",
    "SharedBuild",
    "SupervisedLogits",
    "Target",
    "find_blocks",
    "resolve",
]
