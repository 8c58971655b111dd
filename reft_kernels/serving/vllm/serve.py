"""``reft-serve``: vLLM's OpenAI server with ReFT adapters.

    reft-serve --model DIR [--adapter NAME=FOLDER ...] [--adapter-root DIR] [--slots N]
        [--max-rank R] [any flag of vLLM's server]

Adapters are read and checked before vLLM starts, so that a bad flag ends the program at once with
status 2. The program then becomes ``python -m vllm.entrypoints.openai.api_server``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from reft_kernels.serving.adapters import ServedAdapter, check_fits, load_adapter, served_model
from reft_kernels.serving.vllm.adapter_names import check_name
from reft_kernels.serving.vllm.server_settings import SETTINGS, ServerSettings
from reft_kernels.serving.vllm.settings import KEY, engine_arguments

MODULE = "vllm.entrypoints.openai.api_server"
PLUGINS = ("reft_kernels", "reft_kernels_http")  # the entry points of the engine and of the server
# the groups that VLLM_PLUGINS filters; naming one plugin would turn the others off
_GROUPS = ("general", "io_processor", "platform", "stat_logger")
_OURS = ("--worker-cls", "--scheduler-cls")
MAX_RANK = 16


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that vLLM does not have, and of those that are checked."""
    made = argparse.ArgumentParser(
        prog="reft-serve",
        allow_abbrev=False,
        description="Start vLLM's OpenAI server with ReFT adapters. All other flags are vLLM's.",
    )
    made.add_argument("--model", required=True, help="folder or name of the base model")
    made.add_argument("--served-model-name", nargs="+", help="vLLM's: names of the base model")
    made.add_argument("--additional-config", default="{}", help=argparse.SUPPRESS)
    made.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="adapter to load before the server answers; may be given many times",
    )
    made.add_argument(
        "--adapter-root",
        metavar="DIR",
        help="let clients load the folders of DIR and unload adapters, under /v1/reft",
    )
    made.add_argument(
        "--slots", type=int, default=8, help="adapters on the device at a time (default: 8)"
    )
    made.add_argument(
        "--max-rank",
        type=int,
        help=f"largest rank (default: the adapters', and {MAX_RANK} where clients load)",
    )
    return made


def adapters_by_name(given: Sequence[str], served: Sequence[str]) -> dict[str, Path]:
    """Return the folders of ``--adapter`` by name.

    Raises:
        ValueError: A value is no NAME=FOLDER, a name is used twice or reserved, or there is no such
            folder.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ValueError(f"--adapter: got {text!r}, expected NAME=FOLDER")
        try:
            check_name(name, served)
        except ValueError as error:
            raise ValueError(f"--adapter: {error}") from None
        if name in found:
            raise ValueError(f"--adapter: got the name {name!r} twice, expected each name once")
        if not Path(folder).is_dir():
            raise ValueError(f"--adapter: got {text!r}, expected a folder that exists")
        found[name] = Path(folder).resolve()
    return found


def plugins(environment: Mapping[str, str]) -> str:
    """Return VLLM_PLUGINS: what vLLM would load, and the plugins of reft_kernels."""
    given = environment.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        names = [
            point.name
            for group in _GROUPS
            for point in metadata.entry_points(group=f"vllm.{group}_plugins")
        ]
    return ",".join(dict.fromkeys([*names, *PLUGINS]))


def read_adapters(folders: Mapping[str, Path]) -> dict[str, ServedAdapter]:
    """Read the adapters.

    Raises:
        ValueError: One is corrupt or cannot be served.
    """
    found = {}
    for name, folder in folders.items():
        try:
            found[name] = load_adapter(folder)
        except ValueError as error:
            raise ValueError(f"--adapter {name}: {error}") from None
    return found


def check_model(
    model: str, adapters: Mapping[str, ServedAdapter], max_rank: int, trust_remote_code: bool
) -> None:
    """Check that the adapters fit the model, by its configuration and files.

    Raises:
        ValueError: One does not, or the model's configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--model: got {model!r}, whose configuration is unreadable: {first}"
        ) from None
    served = served_model(config, model)
    for name, adapter in adapters.items():
        try:
            check_fits(adapter, served, max_rank)
        except ValueError as error:
            raise ValueError(f"--adapter {name}: {error}") from None


def prepared(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts vLLM's server and the variables that it needs.

    Args:
        argv: the command line without the program's name.

    Raises:
        ValueError: A flag is wrong, or an adapter cannot be served.
        SystemExit: For ``--help`` and flags that do not parse.
    """
    args, rest = parser().parse_known_args(argv)
    taken = [flag for flag in rest if flag.partition("=")[0].replace("_", "-") in _OURS]
    if taken:
        raise ValueError(f"{taken[0]}: got a class, but reft-serve sets it; expected no such flag")
    folders = adapters_by_name(args.adapter, args.served_model_name or [args.model])
    if args.adapter_root is not None and not Path(args.adapter_root).is_dir():
        raise ValueError(
            f"--adapter-root: got {args.adapter_root!r}, expected a folder that exists"
        )
    try:
        config = json.loads(args.additional_config)
    except ValueError:
        config = None
    if not isinstance(config, dict) or KEY in config:
        raise ValueError(
            f"--additional-config: got {args.additional_config!r}, expected a JSON object without "
            f"{KEY!r}, which --slots and --max-rank set"
        )
    adapters = read_adapters(folders)
    largest = max([adapter.rank for adapter in adapters.values()], default=0)
    # adapters that come later have a rank of their own
    least = MAX_RANK if args.adapter_root is not None or not adapters else 1
    max_rank = max(largest, least) if args.max_rank is None else args.max_rank
    engine = engine_arguments(slots=args.slots, max_rank=max_rank)
    if adapters:
        check_model(args.model, adapters, max_rank, "--trust-remote-code" in rest)
    settings = ServerSettings(
        {name: str(folder) for name, folder in folders.items()},
        None if args.adapter_root is None else str(Path(args.adapter_root).resolve()),
    )
    names = ["--served-model-name", *args.served_model_name] if args.served_model_name else []
    command = [
        *(sys.executable, "-m", MODULE, "--model", args.model, *names),
        *("--worker-cls", engine["worker_cls"], "--scheduler-cls", engine["scheduler_cls"]),
        *("--additional-config", json.dumps(config | engine["additional_config"]), *rest),
    ]
    return command, {
        "VLLM_PLUGINS": plugins(os.environ),
        SETTINGS: json.dumps(dataclasses.asdict(settings)),
    }


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Check the command line and become vLLM's server. Exits with 2 for a wrong flag."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command, variables = prepared(argv)
    except ValueError as error:
        _stop(error)
    if importlib.util.find_spec("vllm") is None:
        _stop("vLLM is not installed; docs/serving.md says how")
    os.environ.update(variables)
    os.execv(command[0], command)


def _stop(problem: object) -> NoReturn:
    print(f"reft-serve: {problem}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
