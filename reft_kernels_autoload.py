"""Makes PEFT know ReFT adapters in programs that never import reft_kernels.

PyTorch calls :func:`watch_peft` at the end of ``import torch``: it is an entry point of the group
``torch.backends``, which ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns off. PEFT's table of methods is
then given a default: the first configuration of type REFT that is looked up imports
``reft_kernels.integrations.peft``. Until then nothing else is imported.

This is a module of its own, beside the package, because it is imported while torch still is: it may
import neither torch nor ``reft_kernels``.
"""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

METHOD = "REFT"
MODULE = "peft.mapping"
TABLE = "PEFT_TYPE_TO_CONFIG_MAPPING"


class MethodTable(dict):
    """PEFT's configuration classes by method, with ReFT's loaded when it is first looked up.

    Raises:
        ImportError: ReFT is looked up and reft_kernels cannot be imported.
        KeyError: as a dict.
    """

    def __missing__(self, key: str) -> type:
        if key == METHOD:
            try:
                import reft_kernels.integrations.peft  # noqa: F401  importing it registers the method
            except Exception as error:
                raise ImportError(
                    f"an adapter of type {METHOD} needs reft_kernels, whose import failed: {error}"
                ) from error
            if key in self:
                return self[key]
        raise KeyError(key)


class _Loader:
    """The loader of PEFT's module, with the table replaced once the module has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = (
            self._loader
        )  # reloads and inspection see PEFT's own
        self._loader.exec_module(module)
        table = getattr(module, TABLE, None)
        if isinstance(table, dict):
            setattr(module, TABLE, MethodTable(table))
        else:
            import warnings

            warnings.warn(
                f"{MODULE} has no {TABLE}: import reft_kernels.integrations.peft before loading "
                "ReFT adapters",
                stacklevel=2,
            )


class _Finder:
    """Finds PEFT's module as the other finders do, and gives it our loader; every other module
    is theirs.
    """

    def __init__(self) -> None:
        self._searching = threading.local()  # another finder may ask us in turn

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._searching.now = False
        if hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def watch_peft() -> None:
    """Have PEFT's table of methods replaced when PEFT is imported; calling it again changes
    nothing.

    The finder stays: taking it out while another thread walks ``sys.meta_path`` would make that
    thread skip a finder.
    """
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
