"""The whole of splitserve in one process, without gRPC.

`LLM` runs prefill and decode of all its requests in one in-flight batch on one engine. It is the
simple way to use a model from Python, and the monolith that the split suite is compared to: both
use the same engine, scheduler and sampler.

    from splitserve import LLM, SamplingParams

    with LLM(model="SmolLM2-135M-Instruct.Q4_1.gguf") as llm:
        [output] = llm.generate("The sky is", SamplingParams(temperature=0, max_tokens=16))
        print(output.outputs[0].text)
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import sys
import weakref
from collections import abc
from types import TracebackType
from typing import TypeAlias, cast

from tqdm import tqdm

from splitserve.chat import ChatTemplate
from splitserve.engine.core import CoreConfig, CoreStats, EngineCore
from splitserve.engine.factory import (
    EngineConfig,
    KvChoice,
    LoadFormat,
    Quantization,
    open_engine,
    step_sizes,
)
from splitserve.engine.protocol import Engine
from splitserve.engine.scheduler import check_step
from splitserve.errors import InvalidRequest
from splitserve.llm_request import Request, dispatch
from splitserve.outputs import OutputBuilder, OutputDelta, RequestOutput
from splitserve.sampling import SamplingLimits, SamplingParams, check_prompt
from splitserve.tokenizer import Tokenizer

Prompt: TypeAlias = str | abc.Sequence[int]
"""Text, or token ids."""

Conversation: TypeAlias = abc.Sequence[abc.Mapping[str, str]]
"""Messages with a role and a content, oldest first."""


_UNBOUNDED = sys.maxsize
"""A library's caller may queue what it likes; admission control is a server's business."""


class LLM:
    """One model, loaded and ready. May be used from several threads.

    `deterministic=True` makes tokens and log-probabilities independent of everything but model,
    prompt, parameters and seed. `skip_tokenizer_init=True` serves a checkpoint that has no
    tokenizer; prompts are then token ids and outputs have no text.

    `load_format="dummy"` draws random weights of the shape that the model's config.json says.
    `quantization` quantises plain weights while they are loaded (fp8, int8, int8-smooth, int4 or
    int4-awq) and `kv_dtype` keys and values (fp8 or int8). `tensor_parallel_size` shares the model
    out over so many processes, on GPUs one each; `pool_bytes` and `threads` are each one's. The
    processes end with this object, and if one of them dies, this process ends with one line that
    says so. Without `pool_bytes` the KV pool has 1 GiB on a CPU and, on a GPU, what the weights
    leave of `gpu_memory_utilization` of its memory. A step has up to `max_batch` sequences and
    `max_step_tokens` tokens, by default 64 and 512 on a CPU, 256 and 8192 on a GPU.

    Raises `CheckpointError` or `ConfigError`, one line that says what is wrong.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        load_format: LoadFormat = "auto",
        quantization: Quantization = "none",
        kv_dtype: KvChoice = "auto",
        tensor_parallel_size: int = 1,
        deterministic: bool = False,
        threads: int = 0,
        pool_bytes: int = 0,
        gpu_memory_utilization: float = 0.9,
        block_tokens: int = 16,
        max_context_tokens: int = 0,
        max_batch: int | None = None,
        max_step_tokens: int | None = None,
        reuse_prefixes: bool = True,
        skip_tokenizer_init: bool = False,
        show_progress: bool = False,
    ) -> None:
        sizes = step_sizes(device)
        max_batch = sizes.max_batch if max_batch is None else max_batch
        max_step_tokens = sizes.max_step_tokens if max_step_tokens is None else max_step_tokens
        check_step(max_batch, max_step_tokens, block_tokens)
        engine_config = EngineConfig(
            model=str(model),
            device=device,
            dtype=dtype,
            load_format=load_format,
            quantization=quantization,
            kv_dtype=kv_dtype,
            tensor_parallel_size=tensor_parallel_size,
            deterministic=deterministic,
            threads=threads,
            pool_bytes=pool_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            block_tokens=block_tokens,
            max_context_tokens=max_context_tokens,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
        )
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_checkpoint(model)
        self._template = None if skip_tokenizer_init else ChatTemplate.from_checkpoint(model)
        engine = open_engine(engine_config, show_progress=show_progress)
        context = engine.spec.max_context_tokens
        self._limits = SamplingLimits(engine.spec.vocab_size, context, max_tokens=context)
        self._ids = itertools.count()
        self._core = EngineCore(
            engine,
            CoreConfig(
                max_batch, max_step_tokens, max_queue=_UNBOUNDED, reuse_prefixes=reuse_prefixes
            ),
            dispatch,
        )
        self._core.start()
        # Not a method of this object: one that nobody holds any more closes its engine, too, and
        # what is left at the interpreter's exit closes then.
        self._close = weakref.finalize(self, _close, self._core, engine)

    def generate(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | abc.Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete all prompts in one in-flight batch; outputs come in the order of prompts.

        Raises `InvalidRequest` naming what is wrong; then nothing was generated.
        """
        each = _as_list(prompts)
        params = self._params_of(sampling_params, len(each))
        requests = [
            self._prepare(prompt, param, index)
            for index, (prompt, param) in enumerate(zip(each, params, strict=True))
        ]
        try:
            for request in requests:
                request.submit()
            return [
                self._collect(prompt, request)
                for prompt, request in tqdm(
                    list(zip(each, requests, strict=True)), unit="request", disable=not use_tqdm
                )
            ]
        finally:
            for request in requests:
                request.abort()

    def chat(
        self,
        conversation: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> RequestOutput:
        """Answer one conversation, rendered with the model's chat template."""
        token_ids = self._render(conversation, add_generation_prompt)
        return self.generate([token_ids], sampling_params)[0]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> abc.Iterator[OutputDelta]:
        """Yield what is new after each step. Closing the iterator ends the request."""
        request = self._prepare(prompt, sampling_params or SamplingParams(), 0)
        try:
            request.submit()
            yield from request.deltas()
        finally:
            request.abort()

    def stats(self) -> CoreStats:
        """What the engine's loop is doing."""
        return self._core.stats()

    def shutdown(self) -> None:
        """Stop the engine's loop and its ranks. The object cannot be used afterwards."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _prepare(self, prompt: Prompt, params: SamplingParams, index: int) -> Request:
        token_ids = self._encode(prompt)
        room = max(1, self._limits.max_context_tokens - len(token_ids))
        params = dataclasses.replace(
            params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
        )
        check_prompt(token_ids, params, self._limits, prefix=f"prompts[{index}]")
        if params.stop and self.tokenizer is None:
            raise InvalidRequest.single("sampling.stop", "needs a tokenizer")
        return Request(f"llm-{next(self._ids)}", token_ids, params, self._core, self.tokenizer)

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InvalidRequest.single("prompt", "there is no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> list[int]:
        if self.tokenizer is None or self._template is None:
            raise InvalidRequest.single("chat", "the model has no chat template; give a prompt")
        text = self._template.render(conversation, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _params_of(
        self, given: SamplingParams | abc.Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * count
        if len(given) != count:
            raise InvalidRequest.single(
                "sampling_params", f"{len(given)} were given for {count} prompts"
            )
        return list(given)

    def _collect(self, prompt: Prompt, request: Request) -> RequestOutput:
        text = prompt if isinstance(prompt, str) else None
        return OutputBuilder(text, request.prompt).extend(request.deltas())


def _close(core: EngineCore, engine: Engine) -> None:
    core.stop()
    engine.close()


def _as_list(prompts: Prompt | abc.Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(abc.Sequence[int], prompts)]
    return list(cast(abc.Sequence[Prompt], prompts))
