"""A training session from settings to results: prepare, train, select, save, score, report."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from reft_train import tasks
from reft_train.config import RunConfig, dump_yaml
from reft_train.data.collating import PaddingCollator
from reft_train.data.tokenizing import Encoder
from reft_train.errors import UserError, wrong
from reft_train.evaluation.scoring import score_set, write_predictions
from reft_train.files import write_text
from reft_train.memory import PeakMeter
from reft_train.methods import adapt, check_base, record_base
from reft_train.models import CLASSIFICATION, Loaded, load, pick_device
from reft_train.ranks import join, together
from reft_train.reporting import versions
from reft_train.tasks.base import Row, Task
from reft_train.training import prepare, run_dir
from reft_train.training.arguments import training_arguments
from reft_train.training.callbacks import LOG, Interrupt, Journal
from reft_train.training.outcome import Outcome
from reft_train.training.sharding import engine_environment, gather_to_generate
from reft_train.training.trainer import ReftTrainer, orthonormality


def quiet() -> None:
    """Disable progress bars and messages of libraries."""
    import datasets

    text = "`is_gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=text, category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def train(
    config: RunConfig,
    *,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    task: Task | None = None,
) -> Outcome:
    """Train an adapter; write it with the log, the results and a report to ``config.output``.

    Args:
        callbacks: additional callbacks, such as one that prunes a search trial.
        task: the task; None: that of the settings.

    Returns:
        The outcome; ``interrupted`` if Ctrl-C or SIGTERM ended it early, with a checkpoint.

    Raises:
        UserError: bad input, detected before anything is written.
        FloatingPointError: the loss is not finite.
    """
    join(cpu=pick_device(config) == "cpu")
    with engine_environment(config):
        return _train(config, callbacks, task)


def _read(config: RunConfig, task: Task) -> tuple[Path | None, prepare.Rows, Loaded, Callable]:
    checkpoint, rows = run_dir.check_output(config), prepare.find_rows(config, task)
    if config.select == "metric" and not rows.held_out:
        raise wrong("select", "'metric' without held-out rows", "validation")
    if config.select == "metric" and not task.metrics:
        raise wrong("select", f"'metric' with {task.name}, which is not scored here", "loss")
    loaded = load(config, task)
    if checkpoint is not None:
        check_base(loaded.model.config, checkpoint)
        path = Path(config.output) / run_dir.DATA  # missing if the run was killed early
        if path.is_file() and path.read_text(encoding="utf-8") != rows.digest():
            started = f"those that {config.output} started with"
            raise UserError(f"resume: the training rows differ from {started}")
    return checkpoint, rows, loaded, prepare.collator(config, loaded)


def _tokenized(config: RunConfig, encoder: Encoder, rows: prepare.Rows) -> tuple[Any, Any]:
    for row in itertools.chain(*rows.tests.values()):
        encoder.read(row)  # rows that are only used after training are checked before it
    if rows.train is None:
        examples: Any = prepare.stream(config, encoder, rows.stream)
    else:
        examples = prepare.tokenized(config, encoder, rows.train, "training rows")
    if not rows.held_out:
        return examples, None
    return examples, prepare.tokenized(config, encoder, rows.held_out, "held-out rows")


def _train(
    config: RunConfig, callbacks: Sequence[transformers.TrainerCallback], task: Task | None
) -> Outcome:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    quiet()
    output = Path(config.output)
    task = task or together(lambda: tasks.get(config.task))
    checkpoint, rows, loaded, collate = together(lambda: _read(config, task))
    encoder = Encoder(task, loaded.tokenizer, loaded.kind, config.max_length)
    examples, held_out = together(lambda: _tokenized(config, encoder, rows), in_turn=True)
    count = None if rows.train is None else len(examples)
    metric = {"none": None, "loss": "loss"}.get(config.select, next(iter(task.metrics), None))

    def adapted() -> tuple[Any, Any]:
        model = adapt(config, loaded, prepare.response_template(config, encoder, rows))
        return model, training_arguments(config, output, model, count, metric)

    def score(model: Any) -> dict[str, float]:
        own = replace(loaded, model=model)
        found = score_set("held out", rows.held_out, own, task, config, progress=False)
        return found.metrics if found.loss is None else {"loss": found.loss, **found.metrics}

    model, arguments = together(adapted)
    if arguments.should_save:
        run_dir.clear(output, everything=config.overwrite)
    classifies = loaded.kind == CLASSIFICATION
    interrupt = Interrupt()
    trainer = ReftTrainer(
        collate=collate,
        eval_collate=PaddingCollator(loaded.tokenizer.pad_token_id),
        sampler=prepare.sampler(config, examples, arguments.world_size),
        heads=loaded.heads,
        head_lr=config.head_lr,
        score=score if config.select == "metric" or classifies else None,
        keep=config.keep,
        prefix_bytes=round(config.prefix_cache * 1e9),
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        callbacks=[Journal(output / LOG), interrupt, *callbacks],
    )
    if classifies:
        # these models ignore num_items_in_batch, so Trainer would sum the means of micro-batches
        trainer.model_accepts_loss_kwargs = False
    trained, parameters = model.get_nb_trainable_parameters()
    heads = [n for n, p in model.named_parameters() if p.requires_grad and trainer.in_head(n)]
    head = sum(model.get_parameter(name).numel() for name in heads)
    if arguments.should_save:
        write_text(output / run_dir.DATA, rows.digest())
        record_base(loaded.model.config, output)
        settings = dump_yaml(config.replace(resume=False, overwrite=False))
        write_text(output / run_dir.CONFIG, settings)
    meter, started = PeakMeter(arguments.device), time.perf_counter()
    meter.start()
    with interrupt:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, memory = time.perf_counter() - started, meter.stop()
    error, state = orthonormality(trainer.model), trainer.state
    interrupted = interrupt.requested and state.global_step < state.max_steps
    trainer.close()
    if trainer.prefix is not None and arguments.should_save:
        print(trainer.prefix.statistics, file=sys.stderr)
    trainer.publish_adapter(output)
    tests = {} if interrupted else _score_tests(trainer, config, loaded, task, rows.tests)
    outcome = Outcome(
        config=config.model_dump(),
        trainable=trained - head,
        head=head,
        total=parameters - trained,
        steps=state.global_step,
        losses=[(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry],
        seconds=seconds,
        step_seconds=trainer.step_seconds(),
        tokens_per_second=trainer.tokens * arguments.world_size / seconds,
        memory=memory,
        validation={} if interrupted else _validation(state, metric),
        tests=tests,
        orthonormality=error,
        interrupted=interrupted,
        versions=versions(),
    )
    if arguments.should_save:
        outcome.save(output)
    return outcome


def _validation(state: Any, metric: str | None) -> dict[str, float]:
    """Return the held-out metrics of the adapter that is kept (last or best checkpoint)."""
    entries = [entry for entry in state.log_history if "eval_loss" in entry]
    if metric is not None and state.best_global_step:
        entries = [entry for entry in entries if entry["step"] == state.best_global_step][:1]
    other = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "step")
    found = (entries or [{}])[-1].items()
    return {name.removeprefix("eval_"): value for name, value in found if name not in other}


def _score_tests(
    trainer: ReftTrainer, config: RunConfig, loaded: Loaded, task: Task, tests: dict[str, list[Row]]
) -> dict[str, dict[str, float]]:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    gather_to_generate(model)
    own = replace(loaded, model=model)
    scored = [score_set(name, rows, own, task, config) for name, rows in tests.items()]
    if scored and trainer.args.should_save:
        write_predictions(Path(config.output), scored)
    return {score.name: score.metrics for score in scored}
