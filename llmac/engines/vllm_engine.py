"""Sampling with vLLM inside the training process: one engine a rank, or one for several neighbouring ranks.

The rules an engine keeps are in files that know no vLLM: `readiness.py` (asleep, incomplete, ready),
`tensor_parallel.py` (ranks that share an engine), `manifest.py` (complete weights). What is particular to vLLM is in
`vllm_process.py` (a guest in this process), `vllm_weights.py` (how weights get in) and `vllm_translation.py`.
"""

import gc
import logging
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from llmac.core.measures import Metrics
from llmac.core.protocols import Completion, Request, SamplingParams
from llmac.engines import vllm_process, vllm_weights
from llmac.engines.deep_sleep import survives_discarding
from llmac.engines.manifest import Manifest
from llmac.engines.prefix_hits import PrefixHits
from llmac.engines.readiness import Readiness, SleepLevel
from llmac.engines.requests import (
    check_requests,
    end_tokens,
    generation_config_of,
    request_seeds,
)
from llmac.engines.tensor_parallel import Offer, TensorParallelGroup, joined, own_part
from llmac.engines.vllm_translation import completions, translated
from llmac.errors import EngineError, LlmacError

if TYPE_CHECKING:
    import vllm

logger = logging.getLogger(__name__)

CPU_KV_CACHE_MB = 256
"""Default room for keys and values on CPU, where vLLM would take 4 GiB or half of the memory."""
CLOSED = "the vLLM engine is closed; build a new one"


class VLLMEngine:
    """A `RolloutEngine` over an in-process `vllm.LLM`: `VLLMEngine("Qwen/Qwen2.5-1.5B", tokenizer)`."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        kv_cache_mb: int | None = None,
        enforce_eager: bool = False,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        sleep_level: SleepLevel = 1,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """Build the engine on the weights of a checkpoint; every rank of the job, in step.

        Args:
            model: Hub id or folder.
            tokenizer: the one prompts were made with; vLLM gets a copy of it.
            dtype: of weights and computation; "auto" takes the checkpoint's.
            max_model_len: tokens of prompt and response together; None takes the model's limit.
            gpu_memory_utilization: fraction of the GPU for weights, keys and values of this engine.
            kv_cache_mb: room for keys and values, MiB; None: what `gpu_memory_utilization` leaves, 256 on CPU.
            enforce_eager: no CUDA graphs: quicker start, slower sampling. Always on without a GPU.
            max_num_seqs: responses sampled at once.
            tensor_parallel_size: neighbouring ranks that share an engine, each with a part of the model; all of them
                call `generate`, `load_weights`, `sleep` and `wake` in step.
            sleep_level: what `sleep` frees on a GPU. 0: nothing. 1: keys and values; weights move to main memory.
                2: weights are discarded, and every sleep must be followed by `load_weights`; if this architecture does
                not survive that at the start, a warning, and 1. Weights always arrive whole, adapters merged, so the
                base of a LoRA run need not survive in the engine. On CPU nothing is ever freed.
            trust_remote_code: run code that comes with the checkpoint.
            revision: branch, tag or commit on the Hub.

        Raises:
            ConfigError: the ranks cannot be divided into groups of `tensor_parallel_size`.
            EngineError: vLLM is missing, does not start, or memory does not suffice; the message names the way out.
        """
        self._llm: vllm.LLM | None = None
        self._job_has_group = torch.distributed.is_initialized()
        self._group = TensorParallelGroup(tensor_parallel_size)
        self._folder = tempfile.TemporaryDirectory(prefix="llmac-tokenizer-")
        tokenizer.save_pretrained(self._folder.name)
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
        config.save_pretrained(self._folder.name)  # vLLM looks for it beside the tokenizer
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self._manifest = Manifest.of(skeleton)
        self._ends = end_tokens(tokenizer, generation_config_of(model, revision))
        self._version = 0
        self._hits = PrefixHits()

        with vllm_process.process_state_restored():
            on_cpu = vllm_process.import_vllm()
            options: dict[str, Any] = {  # keyword arguments of LLM, whose types vary
                "model": model,
                "tokenizer": self._folder.name,
                # vLLM's own "auto" turns float32 into bfloat16.
                "dtype": config.dtype or dtype if dtype == "auto" else dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "tensor_parallel_size": tensor_parallel_size,
                "trust_remote_code": trust_remote_code,
                "revision": revision,
                "logprobs_mode": "processed_logprobs",
                # End tokens come with every request; a checkpoint's own temperature must not act besides it.
                "generation_config": "vllm",
                "enforce_eager": enforce_eager or on_cpu,
                "enable_sleep_mode": sleep_level > 0 and not on_cpu,
                "disable_log_stats": True,
                "enable_prefix_caching": True,
            }
            if on_cpu:
                options["block_size"] = vllm_process.CPU_BLOCK_TOKENS
                # A prompt read in parts puts its random numbers back, which vLLM can do on a GPU only.
                options["enable_chunked_prefill"] = False
            else:
                options["gpu_memory_utilization"] = gpu_memory_utilization
            room = kv_cache_mb if kv_cache_mb is not None or not on_cpu else CPU_KV_CACHE_MB
            if room is not None:
                options["kv_cache_memory_bytes"] = room << 20
            if self._job_has_group and torch.distributed.get_world_size() > 1:
                # vLLM otherwise takes every rank for its own and waits for the others.
                options["distributed_executor_backend"] = "external_launcher"
            shared_name = self._group.exchange(uuid.uuid4().hex)[0]
            shared = on_cpu and tensor_parallel_size > 1
            if shared and torch.get_num_threads() > 1:
                raise EngineError(
                    f"rollout.tensor_parallel_size is {tensor_parallel_size} on CPU, where vLLM's kernels hang in "
                    f"processes of more than one thread; found {torch.get_num_threads()}. Start the job with "
                    "OMP_NUM_THREADS=1, or set rollout.tensor_parallel_size=1"
                )
            self._llm = vllm_process.build(options, shared_name=shared_name if shared else None)
            self._max_tokens = self._llm.llm_engine.model_config.max_model_len
            self._reuses = bool(self._llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
            # A proxy, so that `close` frees the engine.
            self._ready = Readiness(weakref.proxy(self._llm), level=0 if on_cpu else sleep_level)
            self._copies_in = on_cpu and vllm_weights.is_as_loaded(self._llm)
            # Some shapes (small heads on CPU) are refused only by the first forward pass; better now than mid-run.
            self._probe()
            if self._ready.level == 2 and not survives_discarding(self._llm, self._probe):
                logger.warning(
                    "%s does not survive rollout.sleep_level=2 in this version of vLLM: its answers change although "
                    "all weights are sent again. Level 1 is used, which keeps them in main memory",
                    model,
                )
                self._ready.level = 1

    @property
    def policy_version(self) -> int:
        """The version given to the last completed `load_weights`; 0 before any."""
        return self._version

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a prompt that begins like an earlier one of the same weights is not read from the beginning.

        vLLM does so in blocks of 16 tokens or more (32 on CPU), and not for all architectures.
        """
        return self._reuses

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`params.n` completions for each request, in the order of the requests.

        Greedy (temperature 0) tokens report their log-probability at temperature 1. Ranks that share the engine call
        it together, each with its own requests, possibly none.

        Raises:
            EngineError: a request cannot be served, the engine failed, or an update left it without complete weights,
                on this rank or on one that shares the engine.
        """
        offers = self._group.exchange(self._offer(requests))
        if (refusal := offers[self._group.place].refusal) is not None:
            raise EngineError(refusal)
        everything, seeds = joined(offers, self._group.first_rank)
        if not everything:
            return []
        return own_part(self._sampled(everything, seeds), offers, self._group.place)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by the stream and take `version`.

        The stream is consumed tensor by tensor, so nothing can be undone: when it turns out to be incomplete, the
        engine raises and refuses to `generate` until a complete one has arrived. It is read to its end also when the
        engine fails, as other ranks may take part in producing it. A tensor is not used after the next one was taken.

        Raises:
            EngineError: names are missing, unknown or double, a shape differs, the stream broke off, or vLLM failed.
        """
        if self._llm is None:
            raise EngineError(CLOSED)
        broke_off = self._ready.updating
        self._ready.begin_update(version)
        take_in = vllm_weights.copy_in if self._copies_in else vllm_weights.reload
        source = vllm_weights.Source(weights)
        try:
            if broke_off and not self._copies_in:
                vllm_weights.abandon(self._llm)
            take_in(self._llm, self._manifest.checked(source))
        except Exception as error:  # whoever raised, the weights are half new, and it is raised on
            source.drain()
            if isinstance(error, LlmacError):
                raise
            subject = "the stream of weights broke off" if source.failed else "vLLM failed"
            raise EngineError(
                f"{subject} during the update to version {version}: {type(error).__name__}: {error}. Send the "
                "complete weights again, or restart the run from its checkpoint"
            ) from error
        if not source.exhausted:
            source.drain()
            raise EngineError(
                f"vLLM stopped reading before the end of the weights of version {version}; this version of vLLM does "
                "not take an update in one stream, use rollout.engine=hf"
            )
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(str(version))
        self._version = version
        self._ready.finish_update()

    def prefix_hits(self) -> Metrics:
        """The fraction of prompt tokens whose keys and values were cached since the last call."""
        return self._hits.drain()

    def sleep(self) -> None:
        """Free accelerator memory as `sleep_level` says; on CPU nothing is freed."""
        if self._llm is not None:
            self._ready.sleep()

    def wake(self) -> None:
        """Undo `sleep`.

        Raises:
            EngineError: the weights were discarded and have not been sent again.
        """
        if self._llm is not None:
            self._ready.wake()

    def close(self) -> None:
        """Shut vLLM down and free its memory. Safe to call twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        vllm_process.shut_down(llm, keep_group=self._job_has_group)
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._group.close()
        self._folder.cleanup()

    def _probe(self) -> list[float]:
        """Log-probabilities of a short greedy answer to one token."""
        params = SamplingParams(temperature=0.0, max_new_tokens=min(4, self._max_tokens - 1))
        ((completion,),) = self._sampled([Request(prompt_ids=(0,), params=params)], [0])
        self._hits.drain()
        return list(completion.logprobs)

    def _offer(self, requests: Sequence[Request]) -> Offer:
        """This rank's requests, or the reason why it cannot sample."""
        try:
            if self._llm is None:
                raise EngineError(CLOSED)
            self._ready.check()
            check_requests(requests, self._max_tokens)
        except EngineError as error:
            return Offer(refusal=str(error))
        return Offer(requests=tuple(requests), seeds=tuple(request_seeds(requests)))

    def _sampled(self, requests: Sequence[Request], seeds: Sequence[int]) -> list[list[Completion]]:
        """The answers to requests that are known to be served, equal on all ranks that share the engine."""
        assert self._llm is not None
        self._ready.wake()
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        params = [
            translated(request.params, seed, self._ends)
            for request, seed in zip(requests, seeds, strict=True)
        ]
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        except Exception as error:  # whatever vLLM raises, unfinished requests stay in its queue
            self.close()
            about_memory = vllm_process.is_about_memory(error)
            way_out = (
                f"; {vllm_process.MEMORY_KNOBS}" if about_memory else ", or set rollout.engine=hf"
            )
            raise EngineError(
                f"vLLM failed while sampling and has been shut down: {type(error).__name__}: {error}. Restart the run "
                f"from its checkpoint{way_out}"
            ) from error
        for output in outputs:
            # vLLM says it of the last of its responses to finish: the first one to start may have found less.
            count, tokens = len(output.outputs), len(output.prompt_token_ids or ())
            self._hits.add(asked=count * tokens, reused=count * (output.num_cached_tokens or 0))
        return [
            completions(request, output, self._version)
            for request, output in zip(requests, outputs, strict=True)
        ]
