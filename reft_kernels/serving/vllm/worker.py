"""The worker: loads adapters, patches the model, and edits in every forward."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from reft_kernels.serving.bank import Bank
from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.vllm import compatibility, messages, plugin, runners, settings
from reft_kernels.serving.vllm.layers import find_layers, patch_layers
from reft_kernels.serving.vllm.state import WorkerState, model_of

_WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
    "xpu": "vllm.v1.worker.xpu_worker.XPUWorker",
}
_kind = current_platform.device_type
if _kind not in _WORKERS:
    raise AdapterError(f"platform: got {_kind!r}, expected one of {', '.join(_WORKERS)}")
PlatformWorker: Any = resolve_obj_by_qualname(_WORKERS[_kind])


class ReftWorker(PlatformWorker):
    """The platform's worker with ReFT adapters.

    Its public methods are called through ``collective_rpc``, which also keeps the scheduler
    informed.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compatibility.check_version()
        compatibility.check_config(vllm_config)
        compatibility.divide_graphs(vllm_config.compilation_config)
        self.reft_settings = settings.of(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model, patch its layers and load the adapters of the settings."""
        result = super().load_model(*args, **kwargs)
        model = model_of(self.vllm_config.model_config)
        layers = find_layers(self.model_runner.get_model(), model.num_layers)
        bank = Bank(
            list(layers),
            model.width,
            self.reft_settings.slots,
            self.reft_settings.max_rank,
            self.device,
        )
        self.reft = WorkerState(self.reft_settings, model, bank)
        patch_layers(layers)
        self.reft_steps = runners.attach(self.model_runner, self.reft)
        return result

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a step."""
        self.reft.update(messages.news_of(scheduler_output), scheduler_output.finished_req_ids)
        with self.reft_steps:
            return super().execute_model(scheduler_output, *args, **kwargs)

    def reft_load_adapter(
        self, name: str, folder: str, positions: str | None = None
    ) -> dict[str, Any]:
        """Load an adapter under a name; with the same content a second time, change nothing.

        Args:
            name: Name that requests use.
            folder: The folder, on this machine.
            positions: Positions, for a pyreft folder, which does not hold them.

        Returns:
            A description: name, folder, hash, rank, layers, positions, bytes and more.

        Raises:
            ValueError: If it cannot be served, does not fit the model, or the name is taken.
        """
        return self.reft.load(name, folder, positions)

    def reft_unload_adapter(self, name: str, keep: bool = False, missing_ok: bool = False) -> None:
        """Unload an adapter; requests that were accepted before finish with it.

        Args:
            name: Its name.
            keep: Set by the scheduler: an unfinished request or another name needs the weights.
            missing_ok: Set by the scheduler: whether a name that is not loaded is no error.

        Raises:
            UnknownAdapter: If there is no adapter of that name.
        """
        self.reft.unload(name, keep, missing_ok)

    def reft_list_adapters(self) -> list[dict[str, Any]]:
        """Return a description of each loaded adapter."""
        return self.reft.list()

    def reft_stats(self) -> dict[str, int]:
        """Return the counters of the bank; see :meth:`Bank.stats`."""
        return self.reft.bank.stats()


plugin.register()
