"""Which adapter a request of the server gets, decided before the engine sees it.

vLLM resolves a model name that is no base model among its LoRA adapters. ReFT adapters are offered
in that table as :class:`OfferedAdapter`, so that ``model="name"`` works on every route and
``/v1/models`` lists them. ``vllm_xargs`` reaches the engine as ``SamplingParams.extra_args``. Both
meet in :meth:`Admission.generate`, through which every route starts its requests.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError, VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

from reft_kernels.serving.requests import KEY, parse_request
from reft_kernels.serving.vllm.adapter_names import AdapterNames, Version

REFUSAL = "reft: "  # how the scheduler's reasons start


class OfferedAdapter(LoRARequest):
    """A ReFT adapter in vLLM's table of model names. It never reaches the engine."""


class Admission:
    """Gives requests their adapter and counts them.

    Args:
        names: the adapters of the server.
        engine_client: vLLM's client, whose ``generate`` and ``encode`` are replaced.
    """

    def __init__(self, names: AdapterNames, engine_client: EngineClient) -> None:
        self.names = names
        self.admitted = self.refused = 0
        self._generate = engine_client.generate
        self._encode = engine_client.encode
        engine_client.generate = self.generate
        engine_client.encode = self.encode

    def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """Start a request with its adapter, as ``EngineClient.generate``.

        Raises when called and not when first iterated, so that a streamed response has not begun.

        Raises:
            VLLMNotFoundError: No adapter has the name.
            VLLMValidationError: The request's ``reft`` is malformed or cannot be served.
        """
        given = dict(sampling_params.extra_args or {})
        offered = lora_request if isinstance(lora_request, OfferedAdapter) else None
        if KEY not in given and offered is None:
            return self._generate(
                prompt, sampling_params, request_id, lora_request=lora_request, **options
            )
        version, chosen = self._chosen(
            given.get(KEY), None if offered is None else offered.lora_name
        )
        if inspect.isasyncgen(prompt):
            self._refuse("a prompt that arrives in parts cannot be edited")
        length = chosen.get("prompt_length")
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if length is not None and tokens is not None and length > len(tokens):
            self._refuse(
                f"prompt_length: got {length}, expected at most {len(tokens)}, the prompt's"
            )
        # the dictionary is shared by all prompts of an HTTP request
        sampling_params.extra_args = given | {KEY: chosen}
        stream = self._generate(
            prompt,
            sampling_params,
            request_id,
            lora_request=None if offered is not None else lora_request,
            **options,
        )
        self.admitted += 1
        return self.names.holding(version, stream, self._check_output)

    def encode(self, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """Start a pooling request, as ``EngineClient.encode``.

        Raises:
            VLLMValidationError: It asks for a ReFT adapter.
        """
        lora = options.get("lora_request", args[3] if len(args) > 3 else None)
        if isinstance(lora, OfferedAdapter):
            self._refuse(f"adapter {lora.lora_name!r} serves generation, not pooling")
        return self._encode(*args, **options)

    def watch(self, handler: BaseServing) -> None:
        """Check the requests of one of vLLM's handlers before it renders their prompts."""
        accepted = handler._check_model

        async def check_model(request: Any) -> Any:
            problem = await accepted(request)
            if problem is not None:
                return problem
            try:
                self.check(request)
            except VLLMClientError as error:
                return create_error_response(error)
            return None

        handler._check_model = check_model

    def check(self, request: Any) -> None:
        """Refuse a request of the HTTP interface that would be answered without its edit.

        Raises:
            VLLMNotFoundError: No adapter has the name.
            VLLMValidationError: ``reft`` is malformed, in the wrong place or cannot be served.
        """
        given = (getattr(request, "vllm_xargs", None) or {}).get(KEY)
        model = getattr(request, "model", None)
        model = model if self.names.get(model or "") is not None else None
        if KEY in (getattr(request, "model_extra", None) or {}):
            self._refuse(f"got {KEY!r} beside vllm_xargs, expected it inside")
        if given is None and model is None:
            return
        self._chosen(given, model)
        if getattr(request, "use_beam_search", False):
            # vLLM's beams restart from prompt + beam, so that positions would move
            self._refuse("beam search cannot be combined with an adapter")

    def _chosen(self, given: Any, model: str | None) -> tuple[Version, dict[str, Any]]:
        """Return the version of a request's adapter and the engine's form of the request.

        Args:
            given: the value of ``reft`` in ``vllm_xargs``, or None.
            model: the adapter that the request gives as its model, or None.
        """
        try:
            asked = parse_request(_with_adapter(given, model))
        except (TypeError, ValueError) as error:
            self._refuse(str(error))
        if model is not None and asked.adapter != model:
            self._refuse(f"adapter: got {asked.adapter!r} and the model {model!r}, expected one")
        version = self.names.get(asked.adapter)
        if version is None:
            self.refused += 1
            raise VLLMNotFoundError(f"The ReFT adapter `{asked.adapter}` does not exist.")
        rank = version.info["rank"]
        if asked.subspaces is not None and asked.subspaces[-1] >= rank:
            self._refuse(
                f"subspaces: got {list(asked.subspaces)}, expected numbers below {rank}, the rank "
                f"of {asked.adapter!r}"
            )
        options = {
            "coefficient": asked.coefficient,
            "subspaces": None if asked.subspaces is None else list(asked.subspaces),
            "prompt_length": asked.prompt_length,
        }
        chosen = {name: value for name, value in options.items() if value is not None}
        return version, {"adapter": version.key} | chosen

    def _check_output(self, output: Any) -> None:
        """Turn the engine's refusal of a request, which vLLM would report as 500, into a 400."""
        for choice in output.outputs:
            if choice.finish_reason == "error" and str(choice.stop_reason).startswith(REFUSAL):
                self._refuse(choice.stop_reason.removeprefix(REFUSAL))

    def _refuse(self, reason: str) -> NoReturn:
        self.refused += 1
        raise VLLMValidationError(f"{KEY}: {reason}")


def _with_adapter(given: Any, model: str | None) -> Any:
    """Return the value of ``reft`` with the model's name in it, where it names no adapter."""
    if given is None:
        return model
    if model is not None and isinstance(given, str) and given.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):  # parse_request says what is wrong
            given = json.loads(given)
    return {"adapter": model} | given if model is not None and isinstance(given, dict) else given
