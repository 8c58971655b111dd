"""Runs all checks of all families and writes docs/families.md.

    python -m tests.families.table --out docs/families.md [--only llama,bert] [--seconds 120]

The results for the installed transformers are written to
docs/families/transformers-VERSION.json; the page has one column per file. With ``--page``, only
writes the page from the existing files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import warnings
from pathlib import Path

import torch
import transformers

from tests.families import checks, modes
from tests.families.catalogue import FAMILIES
from tests.families.family import Family

Result = dict[str, str]
KINDS = ("decoder", "encoder", "encoder-decoder", "vision", "audio", "vision-language")

TEXT = f"""# Model families

Each family below is a tiny random model of Hugging Face transformers with a ReFT adapter attached
through PEFT, compared with the same model under plain PyTorch hooks that edit the same rows:

- places: `component="block_output"` (or the one named in the table) means the modules that a list
  written by hand names.
- identity: a fresh adapter changes no logit by more than 1e-5 of the largest.
- rows: logits agree within 1e-4 of the largest for batches padded on the right, padded on the left,
  unpadded, and of one example; in models whose labels continue a prompt, also with `labels` and
  with `prompt_lengths`. Families that cannot pad on the left have the other batches.
- gradients: those of every adapter parameter agree within 2e-3 of the largest with autograd's
  through the hooks, in training, with labels where the model takes them.
- generate: greedy tokens and their logits agree with generation under hooks that edit the prompt
  alone, prompts padded on the left, twice in a row.
- save: a saved and loaded adapter has the same parameters and logits, and a disabled one gives the
  base model's logits.
- checkpointing: with gradient checkpointing, `use_reentrant` False and True, logits agree within
  1e-6 of the largest and gradients within 2e-5 with those without it. A mode in which the bare
  model fails, or gives other gradients, is left out.

All runs are on the CPU in float32 with one thread. In mixtures of experts a router at a tie can
choose another expert by rounding alone; each check of such a family has up to three draws of the
adapter's weights, and passes when one of them agrees throughout.

"works": every check passed. "refused": the library raises an error with this reason when the
adapter is attached. "fails": the check named. "not in this version": this transformers lacks the
class. "base model fails": in this version the model raises without an adapter, or PEFT cannot
attach LoRA to it either; "works but for generate" (or checkpointing): the bare model fails there
alone.

Make the table anew with

```
python -m tests.families.table --out docs/families.md
```

in an environment with the transformers in question; the results of each version stay in
`docs/families/`. Components within blocks have tests of their own, `tests/families/test_roles.py`.
{len(modes.COMPILED)} families are also compared under `torch.compile(backend="aot_eager")`, in
training, at two batch sizes: `pytest tests/families -m full -k compile`.
"""


def verdict(family: Family) -> Result:
    """Run all checks of one family in this process."""
    failures = []
    for name in checks.checks_of(family):
        if name == "compile":  # half a minute each, with their own tests
            continue
        try:
            checks.run(family, name)
        except checks.MissingClass as error:
            return {"verdict": "not in this version", "note": str(error)}
        except checks.BaseFails as error:
            result = {"verdict": "base model fails", "note": str(error)[:160]}
            if name not in ("generate", "checkpointing"):
                return result
            failures.append({**result, "verdict": f"works but for {name}"})
        except Exception as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            failures.append({"verdict": f"fails: {name}", "note": " ".join(text.split())[:200]})
    if failures:  # failures of the library take precedence over those of the base model
        return sorted(failures, key=lambda one: not one["verdict"].startswith("fails"))[0]
    if family.refused:
        return {"verdict": "refused", "note": " ".join(checks.refusal(family).split())[:240]}
    return {"verdict": "works", "note": ""}


def in_a_child(family: Family, seconds: int) -> Result:
    """Run the checks in a forked process, so that a crash or hang does not end the run."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        try:
            os.write(write, json.dumps(verdict(family)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return json.loads(answer)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    note = f"no end within {seconds} s" if number == signal.SIGALRM else f"ended by signal {number}"
    return {"verdict": "fails: process", "note": note}


def cell(result: Result | None) -> str:
    """The table cell of a verdict."""
    if result is None:
        return ""
    shown = result["verdict"]
    if shown == "refused":
        reason = result["note"].removeprefix("component: ")
        shown = f"refused: {reason}"
    elif shown not in ("works", "not in this version") and result["note"]:
        shown = f"{shown}: {result['note']}"
    return shown.replace("|", "/").replace("<", "&lt;")


def page(folder: Path) -> str:
    """The text of the page, with one column per file of results."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("transformers-*.json"))]
    versions = [f"transformers {result['transformers']}" for result in results]
    heads = ["family", "kind", *versions, "remark"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, family in sorted(FAMILIES.items(), key=lambda item: KINDS.index(item[1].kind)):
        cells = [cell(result["families"].get(name)) for result in results]
        plain = family.component == "block_output" or "{layer}" in family.component
        named = () if plain else (f"`{family.component}`",)  # paths depend on the version
        remark = "; ".join((*named, *filter(None, (family.note,))))
        lines.append(f"| {' | '.join([name, family.kind, *cells, remark])} |")
    counts = []
    for version, result in zip(versions, results, strict=True):
        verdicts = [r["verdict"].split(":")[0] for r in result["families"].values()]
        counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
        counts.append(f"{version}, PyTorch {result['torch']}: {counted}.")
    return "\n".join([TEXT, "\n\n".join(counts), "", *lines, ""])


def write(path: Path, results: dict[str, Result]) -> None:
    """The results of the installed transformers, in the catalogue's order."""
    written = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "families": {name: results[name] for name in FAMILIES if name in results},
    }
    path.write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    parser.add_argument("--only", help="names of families, separated by commas")
    parser.add_argument("--seconds", type=int, default=120, help="a family's time limit")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    args = parser.parse_args()
    folder = args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"transformers-{transformers.__version__}.json"
    if not args.page:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        old = json.loads(path.read_text())["families"] if path.exists() else {}
        results = {name: result for name, result in old.items() if name in FAMILIES}
        for name in args.only.split(",") if args.only else FAMILIES:
            results[name] = in_a_child(FAMILIES[name], args.seconds)
            print(name, cell(results[name]), flush=True)
            write(path, results)
    args.out.write_text(page(folder))


if __name__ == "__main__":
    main()
