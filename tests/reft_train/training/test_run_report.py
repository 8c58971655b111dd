"""A run's report stands alone, escapes what it shows and is written for runs that ended early
too.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from reft_train.memory import Peak
from reft_train.reporting import smoothed, text_table, versions, write_page
from reft_train.training.outcome import Outcome, run_curves, write_run_report

HOSTILE = '<script>alert("x")</script>&\'"'
OUTCOME = Outcome(
    config={"model": "a/model", "task": "gsm8k", "method": "loreft", "rank": 8, "lora_alpha": None},
    trainable=1_234,
    head=56,
    total=1_000_000,
    steps=20,
    losses=[(10, 2.0), (20, 1.0)],
    seconds=12.5,
    step_seconds=0.625,
    tokens_per_second=4_321.0,
    memory=Peak(500.0, 612.5, "measured somehow"),
    validation={"accuracy": 0.75},
    tests={"boolq": {"accuracy": 0.5, "f1": 0.25}, "piqa": {"accuracy": 1.0}},
    orthonormality=2.5e-7,
    versions={"torch": "9.9"},
)
LOG = [
    {"step": 10, "loss": 2.0, "learning_rate": 1e-3, "orthonormality": 1e-7},
    {"step": 10, "eval_loss": 2.5},
    {"step": 20, "loss": 1.0, "learning_rate": 0.0, "orthonormality": 2e-7},
]


class _Tags(HTMLParser):
    """The tags of a page, with a check that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_two_files_are_written(tmp_path):
    write_run_report(tmp_path / "run", OUTCOME, LOG)
    assert sorted(os.listdir(tmp_path / "run")) == ["loss.png", "report.html"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def _page(outcome, folder, log=LOG):
    write_run_report(folder, outcome, log)
    return (folder / "report.html").read_text()


def test_the_page_fetches_nothing_and_has_no_script(tmp_path):
    text = _page(OUTCOME, tmp_path)
    parsed = _Tags(text)
    assert parsed.open == [] and not parsed.tags & {"script", "link", "iframe", "object"}
    assert re.findall(r'(?:src|href)="([^"]{0,22})', text) == ["data:image/png;base64,"]


@pytest.mark.parametrize(
    "shown",
    [
        "1,234 (0.1234% of the model&#x27;s 1,000,000)",
        "<td>LoReFT</td>",
        "<td>56</td>",
        "<td>20</td>",
        "12.5 s",
        "0.625 s",
        "4,321",
        "612 MiB, 500 MiB of it before training",
        "measured somehow",
        "2.50e-07",
        "<td>held out</td><td>accuracy 0.75</td>",
        "<td>boolq</td><td>accuracy 0.5, f1 0.25</td>",
        "<td>piqa</td><td>accuracy 1</td>",
        "<td>lora_alpha</td><td>None</td>",
        "<td>torch</td><td>9.9</td>",
    ],
)
def test_the_page_shows_each_figure(shown, tmp_path):
    assert shown in _page(OUTCOME, tmp_path)


def test_hostile_texts_are_escaped_wherever_they_stand(tmp_path):
    config = {"model": HOSTILE, "task": HOSTILE, "method": "loreft", HOSTILE: HOSTILE}
    outcome = replace(
        OUTCOME,
        config=config,
        memory=Peak(1.0, 2.0, HOSTILE),
        validation={HOSTILE: 1.0},
        tests={HOSTILE: {HOSTILE: 1.0}},
        versions={HOSTILE: HOSTILE},
    )
    text = _page(outcome, tmp_path)
    assert "script" not in _Tags(text).tags and HOSTILE not in text
    escaped = "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;&#x27;&quot;"
    # two titles, four settings, memory, held-out metric, set and its metric, and a version
    assert text.count(escaped) == 2 + 4 + 1 + 1 + 2 + 2


def test_titles_headings_and_paragraphs_are_escaped(tmp_path):
    page = write_page(tmp_path / "page.html", "<", {"<<": ["<<<"], "none": []}).read_text()
    assert "<title>&lt;</title>" in page and "none" not in page
    assert "<h2>&lt;&lt;</h2><p>&lt;&lt;&lt;</p>" in page


def test_a_table_for_a_terminal_lines_up_and_takes_any_text():
    lines = text_table(("", "a"), [("[b]x[/b]", 1), ("y", "1,000")]).splitlines()
    assert lines == ["              a", "[b]x[/b]      1", "y         1,000"]
    assert "x" * 300 in text_table(("name",), [("x" * 300,)])


def test_smoothing_starts_at_the_first_loss_and_keeps_a_constant():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([4.0, 0.0])[0] == 4.0


def test_a_run_that_was_interrupted_at_once_has_a_report(tmp_path):
    nothing = {"losses": [], "validation": {}, "tests": {}, "orthonormality": None}
    text = _page(replace(OUTCOME, steps=0, interrupted=True, **nothing), tmp_path, [])
    assert "0, interrupted" in text and "held out" not in text and "max |R" not in text


def test_losses_that_are_not_finite_are_told_and_not_drawn(tmp_path):
    log = [*LOG, {"step": 30, "loss": math.nan}, {"step": 40, "loss": math.inf}]
    text = _page(OUTCOME, tmp_path, log)
    assert "2 of 4 logged losses are not finite and not drawn, the first at step 30" in text
    assert run_curves(log) == run_curves(LOG)


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 2.0], [1.0]])
def test_values_that_have_no_logarithm_are_drawn(values):
    log = [
        {"step": step, "loss": value, "orthonormality": value} for step, value in enumerate(values)
    ]
    assert run_curves(log).startswith(b"\x89PNG")


def test_each_panel_is_drawn_only_where_it_was_logged():
    def height(log):
        return int.from_bytes(run_curves(log)[20:24], "big")

    assert height([]) == height([{"step": 1, "loss": 1.0}]) < height(LOG[:1])


def test_figures_name_the_head_only_where_there_is_one():
    assert any("head" in name for name in OUTCOME.figures())
    assert not any("head" in name for name in replace(OUTCOME, head=0).figures())


def test_the_summary_names_losses_and_scores():
    outcome = replace(OUTCOME, config={**OUTCOME.config, "output": "runs/x"})
    lines = outcome.summary().splitlines()
    assert lines[0] == "method: LoReFT" and lines[-1] == "written: runs/x"
    for line in (
        "training loss: 2 at step 10, 1 at the end",
        "held out: accuracy 0.75",
        "boolq: accuracy 0.5, f1 0.25",
    ):
        assert line in lines


def test_versions_name_what_results_depend_on():
    found = versions()
    assert {
        "python",
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "reft_kernels",
    } <= found.keys()
    assert all(found.values())
