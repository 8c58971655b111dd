"""Files outside docs/ that the site shows: changelog, guide for contributors, figures."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FIGURES = "benchmarks/results"
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):<code>~?([^<]*)</code>")


def _on_site(target: str) -> str:
    """A link in a file at the top of the repository, as the page on the site needs it."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix("docs/")


def on_files(files, config):
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = _LINK.sub(lambda link: f"]({_on_site(link[1])}{link[2] or ''})", text)
        text = text.replace("](LICENSE)", "](license.txt)")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "license.txt", abs_src_path=str(ROOT / "LICENSE")))
    for figure in sorted((ROOT / FIGURES).glob("*/figures/*.svg")):
        place = figure.relative_to(ROOT / FIGURES).as_posix()
        files.append(File.generated(config, f"results/{place}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace(f"](../{FIGURES}/", "](results/")


def on_page_content(html, page, config, files):
    """Cross-references of docstrings, written for Sphinx, as code."""
    return _ROLE.sub(r"<code>\1</code>", html)
