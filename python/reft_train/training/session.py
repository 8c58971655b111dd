"""A training session from settings to results: prepare, train, select, save, score, report."""

from __future__ import annotations

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
from reft_train.errors import UserError
from reft_train.evaluation.scoring import score_set
from reft_train.evaluation.writing import write_alpaca_eval, write_predictions
from reft_train.files import write_text
from reft_train.memory import PeakMeter
from reft_train.methods import TITLES, adapt, check_base, record_base
from reft_train.models import CLASSIFICATION, Loaded, load
from reft_train.reporting.log import LOG
from reft_train.reporting.versions import versions
from reft_train.tasks.base import Row, Task
from reft_train.training import prepare
from reft_train.training.arguments import training_arguments
from reft_train.training.callbacks import FiniteLoss, Interrupt, Journal, Progress
from reft_train.training.checkpoints import sweep
from reft_train.training.outcome import Outcome
from reft_train.training.processes import join, together
from reft_train.training.run_dir import (
    CONFIG,
    DATA,
    check_output,
    check_room,
    check_same_data,
    clear,
    publish_adapter,
)
from reft_train.training.run_report import write_run_report
from reft_train.training.sharding import engine_environment, gather_to_generate
from reft_train.training.trainer import ReftTrainer, orthonormality


def _class_metrics(task: Task) -> Callable[[Any], dict[str, float]]:
    def measure(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        predicted = logits.squeeze(-1) if task.labels is None else logits.argmax(-1)
        return task.measure(predicted.tolist(), prediction.label_ids.tolist())

    return measure


def quiet() -> None:
    """Disable progress bars and messages of libraries."""
    import datasets

    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def train(
    config: RunConfig,
    *,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    report: bool = True,
) -> Outcome:
    """Train an adapter; write it with the log, the results and a report to ``config.output``.

    Args:
        callbacks: additional callbacks, such as one that prunes a search trial.
        report: whether to write figures and the HTML page.

    Returns:
        The outcome; ``interrupted`` if Ctrl-C or SIGTERM ended it early, with a checkpoint.

    Raises:
        UserError: bad input, detected before anything is written.
        FloatingPointError: the loss is not finite.
    """
    join(config)
    with engine_environment(config):
        return _train(config, callbacks, report)


def _read(config: RunConfig, task: Task) -> tuple[Path | None, prepare.Rows, Loaded, Callable]:
    checkpoint, rows = check_output(config), prepare.find_rows(config, task)
    if config.select == "metric" and not rows.held_out:
        raise UserError("select: got 'metric' without held-out rows, expected validation")
    if config.select == "metric" and not task.metrics:
        raise UserError(
            f"select: got 'metric' with {task.name}, which is not scored here, expected loss"
        )
    loaded = load(config, task)
    if checkpoint is not None:
        check_base(loaded.model.config, checkpoint)
        check_same_data(rows, Path(config.output))
    return checkpoint, rows, loaded, prepare.collator(config, loaded)


def _tokenized(
    config: RunConfig, task: Task, rows: prepare.Rows, loaded: Loaded
) -> tuple[Any, Any]:
    for test in rows.tests.values():
        prepare.check_rows(test, loaded, task)
    if rows.train is None:
        examples: Any = prepare.stream(config, loaded, task, rows.stream)
    else:
        examples = prepare.tokenized(config, loaded, task, rows.train, "training rows")
    return examples, prepare.tokenized(
        config, loaded, task, rows.held_out, "held-out rows"
    ) if rows.held_out else None


def _train(
    config: RunConfig, callbacks: Sequence[transformers.TrainerCallback], report: bool
) -> Outcome:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    quiet()
    output = Path(config.output)
    task = together(lambda: tasks.get(config.task))
    checkpoint, rows, loaded, collate = together(lambda: _read(config, task))
    examples, held_out = together(lambda: _tokenized(config, task, rows, loaded), in_turn=True)
    count = None if rows.train is None else len(examples)
    metric = (
        task.metrics[0]
        if config.select == "metric"
        else "loss"
        if config.select == "loss"
        else None
    )

    def adapted() -> tuple[Any, Any]:
        model = adapt(config, loaded, prepare.response_template(config, loaded, task, rows))
        check_room(model, config)
        return model, training_arguments(config, output, model, count, metric)

    def score(model: Any) -> dict[str, float]:
        own = replace(loaded, model=model)
        return score_set("held out", rows.held_out, own, task, config, progress=False).metrics

    model, arguments = together(adapted)
    if arguments.should_save:
        sweep(output)
        if config.overwrite:
            clear(output)
    classifies = loaded.kind == CLASSIFICATION
    interrupt, progress = Interrupt(), Progress(TITLES[config.method])
    trainer = ReftTrainer(
        collate=collate,
        sampler=prepare.sampler(config, examples, arguments.world_size),
        heads=loaded.heads,
        head_lr=config.head_lr,
        score=score if config.select == "metric" and not classifies else None,
        keep=config.keep,
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        compute_metrics=_class_metrics(task) if classifies else None,
        callbacks=[FiniteLoss(), Journal(output / LOG), progress, interrupt, *callbacks],
    )
    if classifies:
        # these models ignore num_items_in_batch, so Trainer would sum the means of micro-batches
        trainer.model_accepts_loss_kwargs = False
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(
        number
        for name, number in trained.items()
        if any(f".{part}." in name for part in loaded.heads)
    )
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if arguments.should_save:
        write_text(output / DATA, prepare.digest(rows))
        record_base(loaded.model.config, output)
        write_text(output / CONFIG, dump_yaml(config.replace(resume=False, overwrite=False)))
    meter, started = PeakMeter(arguments.device), time.perf_counter()
    meter.start()
    with interrupt, progress:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds, memory = time.perf_counter() - started, meter.stop()
    error, state = orthonormality(trainer.model), trainer.state
    interrupted = interrupt.requested and state.global_step < state.max_steps
    trainer.close()
    publish_adapter(trainer, output)
    outcome = Outcome(
        config=config.to_dict(),
        trainable=sum(trained.values()) - head,
        head=head,
        total=total,
        steps=state.global_step,
        losses=[(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry],
        seconds=seconds,
        step_seconds=trainer.clock.median(),
        tokens_per_second=trainer.tokens * arguments.world_size / seconds,
        memory=memory,
        validation={} if interrupted else _validation(state, metric),
        tests={}
        if interrupted
        else _score_tests(trainer, config, loaded, task, rows.tests, output),
        orthonormality=error,
        interrupted=interrupted,
        versions=versions(),
    )
    if arguments.should_save:
        if report:
            write_run_report(output, outcome, state.log_history)
        outcome.save(output)
    return outcome


def _validation(state: Any, metric: str | None) -> dict[str, float]:
    """Return the held-out metrics of the adapter that is kept (last or best checkpoint)."""
    lines = [entry for entry in state.log_history if "eval_loss" in entry]
    if metric is not None and state.best_global_step:
        lines = [entry for entry in lines if entry["step"] == state.best_global_step][:1]
    other = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "step")
    return {
        name.removeprefix("eval_"): value
        for name, value in (lines or [{}])[-1].items()
        if name not in other
    }


def _score_tests(
    trainer: ReftTrainer,
    config: RunConfig,
    loaded: Loaded,
    task: Task,
    tests: dict[str, list[Row]],
    output: Path,
) -> dict[str, dict[str, float]]:
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    gather_to_generate(model)
    scored = [
        score_set(name, rows, replace(loaded, model=model), task, config)
        for name, rows in tests.items()
    ]
    if scored and trainer.args.should_save:
        write_predictions(output, scored)
        if not task.metrics:
            write_alpaca_eval(output, scored, f"{Path(config.model).name}-reft")
    return {score.name: score.metrics for score in scored}
