"""The parts of a GPU pass in order of value, with their cases and time budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TOTAL_SECONDS = 540
MOST_FILES = 8  # a borrowed machine may return no more
NO_COMPETITORS = ("torch.compile", "pyreft", "torch backend")  # they take longer than the kernels

ALL_ROWS = (
    "forward rows=8192 d=4096 r=8 bfloat16",
    "backward rows=8192 d=4096 r=8 bfloat16",
    "forward rows=65536 d=4096 r=8 bfloat16",
    "backward rows=65536 d=4096 r=8 bfloat16",
    "inside rows=8192 d=4096 r=8 bfloat16",
    "forward rows=8192 d=4096 r=32 bfloat16",
    "backward rows=8192 d=4096 r=32 bfloat16",
    "forward rows=8192 d=4096 r=8 float32",
)
SELECTED_ROWS = (  # 448 and 112 rows
    "forward batch=32 T=512 positions=f7+l7 d=4096 r=8 bfloat16",
    "backward batch=32 T=512 positions=f7+l7 d=4096 r=8 bfloat16",
    "forward batch=8 T=512 positions=f7+l7 d=4096 r=8 bfloat16",
    "backward batch=8 T=512 positions=f7+l7 d=4096 r=8 bfloat16",
)
R_BUILD = (
    "forward layers=32 d=4096 r=8 float32",
    "both layers=32 d=4096 r=8 float32",
    "forward layers=1 d=4096 r=8 float32",
    "both layers=1 d=4096 r=8 float32",
)
HOST_COST = "function=loreft"
TRAINING_STEP = (
    "step model=llama-3-8b batch=4 T=512 positions=f7+l7 r=8 bfloat16",
    "step model=llama-3.2-1b batch=8 T=512 positions=f7+l7 r=8 bfloat16",
)
PROFILED = (
    (
        "selected forward rows=448 of 16384 d=4096 r=8",
        "selected backward rows=448 of 16384 d=4096 r=8",
        "edit forward rows=8192 d=4096 r=8",
        "edit backward rows=8192 d=4096 r=8",
    ),
    ("householder layers=32 d=4096 r=8", "edit forward rows=65536 d=4096 r=8"),
)
TUNED = (
    "forward rows=448 d=4096 r=8 heuristic=edit_config bfloat16",
    "forward rows=8192 d=4096 r=8 heuristic=edit_config bfloat16",
    "backward rows=8192 d=4096 r=8 heuristic=gradient_config bfloat16",
    "backward rows=8192 d=4096 r=8 heuristic=delta_config bfloat16",
    "forward layers=32 d=4096 r=8 heuristic=build_config float32",
)
SANITIZED = "strides or unselected or skipped or nothing or zero_X or without_signs"


@dataclass(frozen=True)
class Step:
    """A command of a part.

    Attributes:
        name: Names its log and its files.
        seconds: Its budget.
        command: Arguments. ``{python}``, ``{folder}`` (of the part's files), ``{seconds}``,
            ``{arch}``, ``{ncu}`` and ``{sanitizer}`` are replaced.
        needs: What it cannot run without: ``gpu``, ``nvcc``, ``ninja``, ``ncu``, ``sanitizer``,
            ``interpreter`` (of Triton), or the name of a Python package.
        rehearsal: Arguments of its rehearsal without a GPU, on tiny inputs. None if the same, empty
            if the step before has rehearsed it.
        rehearsal_needs: As ``needs``, for the rehearsal.
        cases: What it measures, for the plan.
        environment: Environment variables of the rehearsal.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ("gpu",)
    rehearsal: tuple[str, ...] | None = None
    rehearsal_needs: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Part:
    """Steps whose files form one archive."""

    name: str
    about: str
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> int:
        """The budget of the part."""
        return sum(step.seconds for step in self.steps)


def _suite(
    name: str,
    seconds: int,
    cases: tuple[str, ...],
    needs: tuple[str, ...] = (),
    rounds: int = 9,
    quick: tuple[str, ...] = (),
    match: str = "",
) -> Step:
    run = ("{python}", "-m", "benchmarks.run", "--only", name, "--csv", "{folder}/" + f"{name}.csv")
    run += ("--resume", "--seconds", "{seconds}", "--without", *NO_COMPETITORS)
    chosen = ("--match", match) if match else ("--cases", *cases)
    tiny = ("--cases", *quick) if quick else ("--match", match) if match else ()
    return Step(
        name,
        seconds,
        (*run, "--device", "cuda", "--rounds", str(rounds), *chosen),
        ("gpu", *needs),
        (*run, "--device", "cpu", "--quick", "--rounds", "1", *tiny),
        needs,
        cases or (f"cases with {match}",),
    )


def _profile(number: int, seconds: int) -> Step:
    run = ("{python}", "-m", "benchmarks.gpu_pass.profile", "--out", "{folder}", "--seconds")
    run += ("{seconds}", "--name", f"ncu{number}")
    return Step(
        f"ncu{number}",
        seconds,
        (*run, "--ncu", "{ncu}", "--cases", *PROFILED[number - 1]),
        ("gpu", "ncu"),
        (*run, "--device", "cpu") if number == 1 else (),
        cases=PROFILED[number - 1],
    )


def _sanitize(tool: str, seconds: int, first: bool) -> Step:
    tests = ("{python}", "-m", "benchmarks.gpu_pass.run_tests", "--results", "{folder}/" + tool)
    tests += (
        "--paths",
        "tests/cuda/test_cuda_kernels.py",
        "--workers",
        "1",
        "--seconds",
        "{seconds}",
    )
    return Step(
        tool,
        seconds,
        (*tests, "--under", "{sanitizer}", "--tool", tool, "--", "-k", SANITIZED),
        ("gpu", "sanitizer", "pytest", "hypothesis"),
        (*tests, "--collect-only", "--device", "cpu", "--", "-k", SANITIZED) if first else (),
        ("pytest", "hypothesis"),
        cases=(f"tests/cuda/test_cuda_kernels.py -k '{SANITIZED}'",),
    )


TESTS = ("{python}", "-m", "benchmarks.gpu_pass.run_tests", "--results", "{folder}/tests")

PARTS = (
    Part(
        "build",
        "versions, and the CUDA library for this GPU's architecture",
        (
            Step(
                "versions",
                15,
                ("{python}", "-m", "benchmarks.gpu_pass.versions"),
                needs=(),
                cases=("packages, GPU, driver, commit, chosen backends",),
            ),
            Step(
                "library",
                80,
                ("{python}", "-m", "benchmarks.gpu_pass.cuda_library", "--arch", "{arch}"),
                ("gpu", "ninja"),
                ("{python}", "-m", "benchmarks.gpu_pass.cuda_library", "--arch", "90", "--dry-run"),
                ("nvcc", "ninja"),
                ("an existing library if it fits the sources, else a build for one architecture",),
            ),
        ),
    ),
    Part(
        "tests",
        "correctness of the kernels",
        (
            Step(
                "tests",
                115,
                (*TESTS, "--seconds", "{seconds}"),
                ("gpu", "pytest", "hypothesis"),
                (*TESTS, "--collect-only", "--device", "cpu"),
                ("pytest", "hypothesis"),
                ("tests marked gpu and not full: kernels, functions, reference, torch.compile",),
            ),
        ),
    ),
    Part(
        "edits",
        "edits of all rows and of selected rows against torch.clone",
        (
            _suite(
                "edit_all_rows",
                45,
                ALL_ROWS,
                quick=("forward rows=256 d=128 r=4 float32", "backward rows=256 d=128 r=4 float32"),
            ),
            _suite("edit_selected_rows", 45, SELECTED_ROWS),
        ),
    ),
    Part(
        "operators",
        "build of R, and host time of a call",
        (
            _suite("r_build", 20, R_BUILD, quick=("both layers=4 d=256 r=4 float32",)),
            _suite("host_cost", 25, (), match=HOST_COST),
        ),
    ),
    Part(
        "step",
        "a whole training step on a Llama-8B shape with random weights",
        (_suite("training_step", 60, TRAINING_STEP, ("transformers", "peft"), rounds=5),),
    ),
    Part(
        "profile",
        "memory traffic by ncu, limited to the measured calls",
        (_profile(1, 22), _profile(2, 13)),
    ),
    Part(
        "sanitize",
        "compute-sanitizer on a few tests of the CUDA kernels",
        (_sanitize("memcheck", 25, True), _sanitize("racecheck", 25, False)),
    ),
    Part(
        "tuning",
        "launch parameters of the Triton kernels against adjacent values",
        (
            Step(
                "tuning",
                40,
                (
                    *("{python}", "-m", "benchmarks.tuning", "--csv", "{folder}/tuning.csv"),
                    *("--device", "cuda", "--rounds", "9", "--candidates", "5", "--resume"),
                    *("--candidate-seconds", "6", "--seconds", "{seconds}", "--cases", *TUNED),
                ),
                ("gpu", "triton"),
                (
                    *("{python}", "-m", "benchmarks.tuning", "--csv", "{folder}/tuning.csv"),
                    *("--device", "cpu", "--rounds", "1", "--candidates", "2", "--resume"),
                    *("--candidate-seconds", "6", "--seconds", "{seconds}", "--quick", "--cases"),
                    "forward rows=4 d=32 r=2 heuristic=edit_config float32",
                ),
                ("triton", "interpreter"),
                TUNED,
                (("TRITON_INTERPRET", "1"),),
            ),
        ),
    ),
)


def lines(parts: tuple[Part, ...] = PARTS) -> Iterator[str]:
    """Yield the plan as text: each part with its budget, each step with its cases."""
    for part in parts:
        yield f"{part.name:<10} {part.seconds:>4} s  {part.about}"
        for step in part.steps:
            yield f"  {step.name:<18} {step.seconds:>4} s"
            yield from (f"      {case}" for case in step.cases)
    total = sum(part.seconds for part in parts)
    yield f"total {total} s in {len(parts)} parts, at most {len(parts)} files"


def check(parts: tuple[Part, ...] = PARTS) -> None:
    """Raise ``ValueError`` if the plan breaks a limit."""
    total = sum(part.seconds for part in parts)
    if total >= TOTAL_SECONDS:
        raise ValueError(f"budgets: got {total} s in all, expected less than {TOTAL_SECONDS} s")
    if len(parts) > MOST_FILES:
        raise ValueError(f"parts: got {len(parts)}, expected at most {MOST_FILES}, a file each")
