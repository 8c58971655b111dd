"""Converts a saved ReFT adapter from one framework to another.

    python -m reft_kernels.convert SRC DST --to pyreft|adapterhub|peft

SRC is a folder written by pyreft, by AdapterHub's ``adapters`` or by the PEFT tuner of this
package; its format is detected from its files. DST is written completely or not at all.

Exactness:

* pyreft and AdapterHub folders hold W, b and R bit for bit, except that W and b are rounded to the
  target's dtype. For pyreft this is bf16 unless the source used another dtype; ``--dtype``
  overrides it. The R of a PEFT folder is evaluated on the CPU of this machine.
* PEFT folders of this package hold W and b bit for bit. R is stored as unconstrained parameters X,
  computed in fp64 and rounded to fp32. R(X) differs from the source's R by fp32 rounding: by at
  most 1e-8 to 3e-8 for d from 64 to 8192.
* What DST cannot hold exactly is written to ``reft_exact.safetensors`` in DST (see
  :mod:`reft_kernels.conversion.exact`). A conversion and its reverse then restore R, W, b and X bit
  for bit, unless the weights were changed in between. pyreft to AdapterHub and back is exact
  without that file.

Settings that the target cannot express are an error: exit code 2, a one-line message, and DST
unchanged. Loading a file executes no code from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from reft_kernels.activations import canonical_activation
from reft_kernels.adapter_files import ConversionError, check_target, new_folder
from reft_kernels.conversion import adapterhub_folder, exact, peft_folder, pyreft_folder
from reft_kernels.conversion.common import DTYPES, Options, SavedAdapter, check, select_layers
from reft_kernels.interventions import STACKED

FORMATS: dict[str, ModuleType] = {
    m.NAME: m for m in (pyreft_folder, adapterhub_folder, peft_folder)
}


def detect(folder: Path) -> str:
    """Return the format of a folder, determined from its files.

    Raises:
        ConversionError: If ``folder`` is not a folder, or matches no format or several.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is not a folder")
    matching = [name for name, form in FORMATS.items() if form.matches(folder)]
    if len(matching) != 1:
        files = (
            "intkey_*.bin (pyreft), or adapter_config.json with 'peft_type' (peft) or 'config' "
            "(adapterhub)"
        )
        raise ConversionError(
            f"{folder}: is {' and '.join(matching) or 'no known format'}; expected {files}; --from "
            "tells"
        )
    return matching[0]


def _read(folder: Path, form: str, options: Options) -> SavedAdapter:
    try:
        adapter = FORMATS[form].read(folder, options)
    except ConversionError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # a setting has an unexpected type
        raise ConversionError(
            f"{folder}: malformed {form} folder: {type(error).__name__} {error}"
        ) from None
    check(adapter)
    return adapter


def load(folder: Path, form: str, options: Options) -> SavedAdapter:
    """Read an adapter.

    Args:
        folder: The folder of the adapter; ``reft_exact.safetensors`` in it is applied.
        form: Its format, "pyreft", "adapterhub" or "peft".
        options: Settings that replace those of the folder.

    Raises:
        ConversionError: If the folder cannot be read or converted.
    """
    adapter = _read(folder, form, options)
    exact.restore(folder, adapter)
    select_layers(adapter, options.layers)
    for name in ("positions", "pyreft_positions", "component", "activation", "base_model"):
        value = getattr(options, name)
        if value is not None:
            setattr(adapter, name, value)
    try:
        adapter.activation = canonical_activation(adapter.activation)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if options.component is not None:
        # It contains the path of the previous component
        adapter.details.pop(adapterhub_folder.NAME, None)
    check(adapter)
    return adapter


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    form: str | None = None,
    options: Options | None = None,
    force: bool = False,
) -> SavedAdapter:
    """Convert a saved adapter; see the module documentation.

    Args:
        source: The folder to read.
        target: The folder to write.
        to: Format of ``target``: "pyreft", "adapterhub" or "peft".
        form: Format of ``source``; detected if None.
        options: Settings that ``source`` does not contain, or that replace its settings.
        force: Replace ``target`` if it is a folder that is not empty.

    Returns:
        The adapter in the common form. Its ``notes`` are messages for the user.

    Raises:
        ConversionError: If the adapter cannot be read or expressed in the target format. ``target``
            is then unchanged.
    """
    source, target, options = Path(source), Path(target), options or Options()
    for name in (to, form):
        if name is not None and name not in FORMATS:
            raise ConversionError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    check_target(target, force)
    adapter = load(source, form or detect(source), options)
    with new_folder(target, force) as folder:
        FORMATS[to].write(adapter, folder, options)
        back = _read(
            folder,
            to,
            dataclasses.replace(options, intervention=adapter.intervention, without_head=False),
        )
        exact.keep(folder, adapter, back)
    return adapter


def _layers(text: str) -> str | list[int]:
    """Parse the value of ``--layers``."""
    if text == "all":
        return text
    try:
        numbers = [int(part) for part in text.replace(";", ",").split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected 'all' or different layer numbers such as 3,9,18"
        )
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reft_kernels.convert",
        description="Convert a saved ReFT adapter from one framework's folder to another's.",
    )
    parser.add_argument("source", metavar="SRC", help="the folder to read")
    parser.add_argument("target", metavar="DST", help="the folder to make")
    parser.add_argument("--to", required=True, choices=[*FORMATS], help="the format of DST")
    parser.add_argument(
        "--from",
        dest="form",
        choices=[*FORMATS],
        help="the format of SRC (default: detected from its files)",
    )
    parser.add_argument(
        "--layers", type=_layers, help="'all' or the layers to convert, such as 3,9,18"
    )
    parser.add_argument(
        "--positions",
        help="tokens that are edited, such as f7+l7: a pyreft folder does not hold them",
    )
    parser.add_argument(
        "--pyreft-positions",
        action="store_const",
        const=True,
        help="positions count as pyreft's ReftDataset classes count them",
    )
    parser.add_argument(
        "--component", help="what is edited: a role, or a path such as 'model.layers.{layer}.mlp'"
    )
    parser.add_argument(
        "--intervention",
        choices=[n for n in STACKED if n != "red"],
        help="where SRC does not say which it is",
    )
    parser.add_argument(
        "--activation", help="activation of the learned source: a pyreft folder does not hold it"
    )
    parser.add_argument(
        "--base-model",
        help="name or folder of the base model; AdapterHub's keys need its structure",
    )
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES],
        help="of W and b in DST (default: bfloat16 for pyreft, else float32)",
    )
    parser.add_argument(
        "--without-head", action="store_true", help="leave out trained heads and modules_to_save"
    )
    parser.add_argument("--force", action="store_true", help="replace DST where it is not empty")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error, which is printed as one line on stderr."""
    parsed = _parser().parse_args(arguments)
    options = Options(
        **{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Options)}
    )
    try:
        adapter = convert(
            parsed.source,
            parsed.target,
            parsed.to,
            form=parsed.form,
            options=options,
            force=parsed.force,
        )
    except (ConversionError, OSError) as error:
        print(f"reft_kernels.convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for note in adapter.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{parsed.target}: {parsed.to}, {adapter.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
