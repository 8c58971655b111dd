"""Registration of the ReFT method with PEFT in programs that do not import reft_kernels.

PyTorch calls :func:`watch_peft` at the end of ``import torch``, through the entry point group
``torch.backends`` (disabled by ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``). It installs an import hook
that replaces PEFT's table of configuration classes with a :class:`MethodTable`, which imports
``reft_kernels.integrations.peft`` when the method REFT is first looked up.

This module is imported while torch is still being imported. It is therefore separate from the
package and must import neither torch nor ``reft_kernels``.
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
    """PEFT's table of configuration classes, which imports ReFT's class at its first lookup.

    Raises:
        ImportError: If ReFT is looked up and reft_kernels cannot be imported.
        KeyError: If another method is looked up that the table does not contain.
    """

    def __missing__(self, key: str) -> type:
        if key == METHOD:
            try:
                import reft_kernels.integrations.peft  # noqa: F401  registers the method
            except Exception as error:
                raise ImportError(
                    f"an adapter of type {METHOD} needs reft_kernels, whose import failed: {error}"
                ) from error
            if key in self:
                return self[key]
        raise KeyError(key)


class _Loader:
    """Loader of ``peft.mapping`` that replaces the table after it has executed the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Restore the original loader, so that importlib.reload and inspect use it
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
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
    """Meta path finder that wraps the loader of ``peft.mapping`` and ignores other modules."""

    def __init__(self) -> None:
        self._searching = threading.local()  # guards against recursion through other finders

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
    """Install the import hook; further calls have no effect.

    The hook is never removed: removing it while another thread iterates over ``sys.meta_path``
    would make that thread skip a finder.
    """
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
