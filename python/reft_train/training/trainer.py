"""Trainer with seeded order, one build of R a step, two learning rates and atomic checkpoints."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers.trainer_utils import EvalLoopOutput

from reft_kernels.integrations.peft import keep_prefix_states, keep_supervised_logits, share_build
from reft_kernels.interventions import Intervention
from reft_kernels.parametrization import orthonormality_error
from reft_train.errors import UserError, one_line, wrong
from reft_train.evaluation.generating import run_batches
from reft_train.files import replace_folder, write_text
from reft_train.methods import save_adapter
from reft_train.models import evaluating
from reft_train.training import sharding
from reft_train.training.callbacks import Bookkeeping
from reft_train.training.run_dir import ADAPTER, LOSS, STAGING, publish, rotate

cross_entropy = functools.partial(F.cross_entropy, reduction="none")


def orthonormality(model: nn.Module) -> float | None:
    """Return max |R R^T - I| over all R of a model, or None without R. A collective operation."""
    stacks = [m for m in model.modules() if isinstance(m, Intervention) and m.orthonormal]
    with torch.no_grad():
        built = [weights.write for stack in stacks for weights in stack()]
        return max((float(orthonormality_error(R)) for R in built), default=None)


class ReftTrainer(transformers.Trainer):
    """Trainer with exact resumption and atomic checkpoints.

    Args:
        collate: converts examples to a batch.
        eval_collate: converts held-out examples to a batch with a row for each; None: ``collate``.
        sampler: order of the training examples, None for a stream.
        head_lr: learning rate of parameters under ``heads``. None: the same as the others.
        score: called with the model at each evaluation; returns metrics, which include the loss of
            a model that classifies.
        keep: number of checkpoints to keep, in addition to the best one.
        prefix_bytes: limit of the states that :func:`~reft_kernels.integrations.peft.\
keep_prefix_states` keeps; 0: none are kept.
        callbacks: additional callbacks.
        kwargs: passed to :class:`transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        collate: Callable[[Sequence[dict]], dict],
        eval_collate: Callable[[Sequence[dict]], dict] | None = None,
        sampler: torch.utils.data.Sampler | None,
        heads: Sequence[str] = (),
        head_lr: float | None = None,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
        keep: int = 2,
        prefix_bytes: int = 0,
        callbacks: Sequence[transformers.TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        def counted(features: Sequence[dict]) -> dict:
            # a Python number: reading a tensor would synchronize the device
            count = sum(len(feature["input_ids"]) for feature in features)
            return {**collate(features), "token_count": count}

        super().__init__(data_collator=counted, callbacks=[Bookkeeping(self), *callbacks], **kwargs)
        self.sampler, self.heads, self.head_lr = sampler, tuple(heads), head_lr
        self.score, self.keep, self.eval_collate = score, keep, eval_collate or collate
        self.tokens, self._batch_tokens, self.step_ends = 0, 0, []
        self._logged: tuple[float, int] | None = None
        self._staging = False
        self._loss: torch.Tensor | float = 0.0
        self.loss_steps = 0
        several = self.args.gradient_accumulation_steps > 1
        edits = any(isinstance(module, Intervention) for module in self.model.modules())
        # DeepSpeed takes gradients in each backward, before a shared build of R has produced any
        shares = several and edits and not self.is_deepspeed_enabled
        self._hooks = contextlib.ExitStack()
        self._shared = self._hooks.enter_context(share_build(self.model)) if shares else None
        if not self.args.torch_compile:  # compiled calls compute all logits
            with contextlib.suppress(ValueError):  # so do models that do not support it
                self._hooks.enter_context(keep_supervised_logits(self.model))
        self.prefix = None
        if prefix_bytes:
            try:
                prefix = keep_prefix_states(self.model, max_bytes=prefix_bytes)
            except ValueError as error:
                self.close()
                raise UserError(f"prefix_cache: {one_line(error)}") from error
            self.prefix = self._hooks.enter_context(prefix)

    def close(self) -> None:
        self._hooks.close()

    def create_accelerator_and_postprocess(self) -> None:
        """See Trainer; also shards models on CPUs if requested."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            sharding.shard_on_cpus(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler | None:
        return self.sampler

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Create the optimizer with groups for edits and head, with and without weight decay."""
        if self.is_fsdp_enabled:
            # must precede the engine, which reads the optimizer's parameters
            sharding.shard_stacks(self.model)
        if self.optimizer is None:
            model = args[0] if args and args[0] is not None else self.model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(self._groups(model), **options)
        return self.optimizer

    def in_head(self, name: str) -> bool:
        """Whether a parameter belongs to a new head."""
        return any(f".{part}." in f".{name}." for part in self.heads)

    def _groups(self, model: nn.Module) -> list[dict]:
        groups: dict[tuple[bool, bool], dict] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                head = self.in_head(name)
                bias = name.endswith((".b", ".bias", ".s"))
                rate = {"lr": self.head_lr} if head and self.head_lr is not None else {}
                decay = 0.0 if bias else self.args.weight_decay
                group = groups.setdefault(
                    (head, bias), {"params": [], "weight_decay": decay, **rate}
                )
                group["params"].append(parameter)
        return list(groups.values())

    def _prepare_inputs(self, inputs: dict) -> dict:
        self._batch_tokens = inputs.pop("token_count", 0)
        return super()._prepare_inputs(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a training step; after its last forward, backpropagate R's gradients in one build."""
        loss = super().training_step(*args, **kwargs)
        self._loss = self._loss + loss.detach().float()
        self.tokens += self._batch_tokens
        if self._shared is not None and self.accelerator.gradient_state.sync_gradients:
            self._shared.flush()
        return loss

    def step_seconds(self) -> float:
        """Return the median time from one optimizer step to the next, 0 without two of them.

        The device is not synchronized, but a queue of steps moves at the device's speed.
        """
        intervals = [after - before for before, after in pairwise(self.step_ends)]
        return statistics.median(intervals) if intervals else 0.0

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log as Trainer does, with tokens per second and orthonormality in training entries.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if "loss" in logs:
            # Trainer's own mean restarts when a run is resumed between two log entries
            logs["loss"] = self._losses().mean().item() / self.loss_steps
            self._loss, self.loss_steps = 0.0, 0
            if not math.isfinite(logs["loss"]):
                what = f"the loss is {logs['loss']} at step {self.state.global_step}"
                raise FloatingPointError(f"{what}; a lower lr or float32 may help")
            now = time.perf_counter()
            if self._logged is not None:
                seconds = max(now - self._logged[0], 1e-9)
                tokens = (self.tokens - self._logged[1]) * self.args.world_size
                logs["tokens_per_second"] = round(tokens / seconds, 1)
            self._logged = (now, self.tokens)
            error = orthonormality(self.model)
            if error is not None:
                logs["orthonormality"] = error
            if self.prefix is not None:
                logs["prefix_hit_rate"] = round(self.prefix.statistics.hit_rate, 4)
                logs["prefix_bytes"] = self.prefix.statistics.bytes
        super().log(logs, *args)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Compute the held-out loss and metrics.

        The loss of a model that generates is a mean over labels, independent of batch size and
        number of processes (transformers averages the means of batches, and repeats examples in the
        last ones). That of a model that classifies is among the metrics of ``score``.
        """
        dataset = dataloader.dataset
        shifted = not getattr(self.model.config, "is_encoder_decoder", False)

        def forward(batch: list[int]) -> list[tuple[float, int]]:
            inputs = self._prepare_inputs(self.eval_collate([dataset[index] for index in batch]))
            with self.compute_loss_context_manager():
                logits, labels = self.model(**inputs).logits.float(), inputs["labels"]
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten()).view_as(labels).sum(1)
            return list(zip(losses.tolist(), labels.ne(-100).sum(1).tolist(), strict=True))

        metrics = {}
        if self.score is not None:
            sharding.gather_to_generate(self.model)
            metrics = self.score(self.model)
        if "loss" not in metrics:
            lengths, size = dataset["length"][:], self.args.eval_batch_size
            with evaluating(self.model):
                found = run_batches(lengths, size, forward, "held-out rows", False)
            losses, counts = zip(*found, strict=True)
            metrics["loss"] = math.fsum(losses) / sum(counts)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, len(dataset))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """See Trainer; the first log entry after a resume includes the steps before it."""
        if resume_from_checkpoint is not None:
            saved = json.loads((Path(resume_from_checkpoint) / LOSS).read_text(encoding="utf-8"))
            losses, rank = saved["losses"], self.args.process_index
            self._loss = losses[rank] if rank < len(losses) else sum(losses) / len(losses)
            self.loss_steps = saved["steps"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _losses(self) -> torch.Tensor:
        """Return each process's sum of losses since the last log entry."""
        loss = torch.as_tensor(self._loss, dtype=torch.float32, device=self.args.device)
        return self.accelerator.gather(loss.reshape(1))

    def _get_output_dir(self, trial: Any = None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self._staging else folder

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint atomically, so that a kill leaves the previous one intact."""
        folder, name = Path(self._get_output_dir()), f"checkpoint-{self.state.global_step}"
        self._staging = True
        try:
            super()._save_checkpoint(*args, **kwargs)
            losses = self._losses().tolist()
            self.accelerator.wait_for_everyone()
            if self.state.best_global_step:
                best = folder / f"checkpoint-{self.state.best_global_step}"
                if best.exists() or best.name == name:
                    self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                staged = folder / STAGING / name
                write_text(staged / LOSS, json.dumps({"losses": losses, "steps": self.loss_steps}))
                self.state.save_to_json(str(staged / "trainer_state.json"))
                publish(staged, folder / name)
                rotate(folder, self.keep, self.state.best_model_checkpoint)
        except Exception as error:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
            # torch's writer raises a RuntimeError that names inline_container
            if isinstance(error, OSError | SafetensorError) or "inline_container" in str(error):
                what = f"{folder}, where no checkpoint can be written ({one_line(error)})"
                raise wrong("output", what, "a writable folder with space") from error
            raise
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See Trainer; for a sharded model only trained parameters are gathered."""
        if self.is_fsdp_enabled:
            self._save(output_dir, sharding.trained_state(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def publish_adapter(self, output: Path) -> None:
        """Write the adapter to a temporary folder of the run's output and rename it."""
        staged = output / ".adapter-new"
        self._save(staged, sharding.trained_state(self.model) if self.is_fsdp_enabled else None)
        if self.args.should_save:
            replace_folder(staged, output / ADAPTER)
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # stacks rebuild their weights, since loading into shards is not detected
        self.model.train(self.model.training)

    def _save(self, output_dir: str | Path | None = None, state_dict: dict | None = None) -> None:
        """Save only the adapter in PEFT's format, without tokenizer and pickled arguments."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            bare = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            save_adapter(bare, folder, state_dict)
