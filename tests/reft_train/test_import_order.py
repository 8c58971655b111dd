"""The packages of reft_train import each other in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import reft_train

ORDER = (
    "errors",
    "files",
    "memory",
    "ranks",
    "reporting",
    "tasks",
    "recipes",
    "config",
    "flags",
    "commands",
    "models",
    "methods",
    "data",
    "evaluation",
    "training",
    "search",
    "compare",
    "evaluate",
    "chat",
    "run",
    "__main__",
)


def imports(path: Path) -> set[str]:
    """The parts of reft_train that a file imports, apart from what only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(node) for block in checked for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in skipped
            and (node.module or "").startswith("reft_train")
        ):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way():
    root = Path(reft_train.__file__).parent
    for path in root.rglob("*.py"):
        part = path.relative_to(root).with_suffix("").parts[0]
        if part != "__init__":
            later = [name for name in imports(path) if ORDER.index(name) > ORDER.index(part)]
            assert not later, f"{path} imports {later}"
