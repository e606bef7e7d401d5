"""Sampling with vLLM inside this process. The only file of the project that imports vllm, and only inside methods.

Facts this file rests on (vLLM 0.32), each guarded or proved at run time by `probe.py`:
    - An update is ONE `reload_weights` call over the complete stream. A fused layer split over two calls ends up
      neither old nor new, silently; a stream that breaks off leaves layers without weights, so `generate` refuses until
      a complete one has arrived.
    - On CPU, vLLM packs weights for its matrix kernels. `reload_weights` packs them again, except a tied `lm_head`,
      which keeps computing with the old ones: packing is switched off, and `lm_head` is dispatched anew each time.
    - On CPU, building an engine replaces `torch.set_num_threads` by a function that does nothing, sets the threads
      to 1, reseeds the random states and edits the environment; all are put back.
"""

import contextlib
import gc
import logging
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from llmac.core.protocols import Completion, Request, SamplingParams
from llmac.core.types import Finish
from llmac.engines.manifest import Manifest
from llmac.engines.requests import check_requests, end_tokens, request_seeds
from llmac.errors import EngineError

if TYPE_CHECKING:
    import vllm

logger = logging.getLogger(__name__)

CPU_KV_CACHE_MB = 256
"""Default room for keys and values on CPU, where vLLM would take 4 GiB or half of the memory."""
NOT_INSTALLED = (
    "rollout.engine is vllm, but vLLM is not installed here; run `pip install llmac[rollout]` on a machine with GPUs "
    "or `pip install llmac[cpu]` without, or set rollout.engine=hf"
)
MEMORY_KNOBS = (
    "lower rollout.max_model_len or rollout.max_num_seqs; give the engine more with rollout.gpu_memory_utilization "
    "(GPU) or rollout.kv_cache_mb; or lower actor.max_tokens_per_microbatch if training holds the memory"
)


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
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """Build the engine on the weights of a checkpoint.

        Args:
            model: Hub id or folder.
            tokenizer: the one prompts were made with; vLLM gets a copy of it.
            dtype: of weights and computation; "auto" takes the checkpoint's.
            max_model_len: tokens of prompt and response together; None takes the model's limit.
            gpu_memory_utilization: fraction of the GPU for weights, keys and values of this engine.
            kv_cache_mb: room for keys and values, MiB; None: what `gpu_memory_utilization` leaves, 256 on CPU.
            enforce_eager: no CUDA graphs: quicker start, slower sampling. Always on without a GPU.
            max_num_seqs: responses sampled at once.
            tensor_parallel_size: GPUs a model is cut over; above 1, every rank of the job calls the engine in step.
            trust_remote_code: run code that comes with the checkpoint.
            revision: branch, tag or commit on the Hub.

        Raises:
            EngineError: vLLM is missing, does not start, or memory does not suffice; the message names the way out.
        """
        self._llm: vllm.LLM | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="llmac-tokenizer-")
        tokenizer.save_pretrained(self._folder.name)
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
        config.save_pretrained(self._folder.name)  # vLLM looks for it beside the tokenizer
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self._manifest = Manifest.of(skeleton)
        self._ends = end_tokens(tokenizer, _generation_config(model, revision))
        self._version = 0
        self._unusable: str | None = None
        self._asleep = False

        world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        with _process_state_restored():
            self._on_cpu = _import_vllm()
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
                "enforce_eager": enforce_eager or self._on_cpu,
                "enable_sleep_mode": not self._on_cpu,
                "disable_log_stats": True,
            }
            if not self._on_cpu:
                options["gpu_memory_utilization"] = gpu_memory_utilization
            room = kv_cache_mb if kv_cache_mb is not None or not self._on_cpu else CPU_KV_CACHE_MB
            if room is not None:
                options["kv_cache_memory_bytes"] = room << 20
            if world_size > 1:
                # vLLM otherwise takes every rank for its own and waits for the others.
                options["distributed_executor_backend"] = "external_launcher"
            self._llm = _build(options)
            self._max_tokens = self._llm.llm_engine.model_config.max_model_len
            # Some shapes (small heads on CPU) are refused only by the first forward pass; better now than mid-run.
            self.generate(
                [Request(prompt_ids=(0,), params=SamplingParams(temperature=0.0, max_new_tokens=1))]
            )

    @property
    def policy_version(self) -> int:
        """The version given to the last completed `load_weights`; 0 before any."""
        return self._version

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`params.n` completions for each request, in the order of the requests.

        Greedy (temperature 0) tokens report their log-probability at temperature 1.

        Raises:
            EngineError: a request cannot be served, the engine failed, or an update left it without complete weights.
        """
        llm = self._usable()
        check_requests(requests, self._max_tokens)
        if not requests:
            return []
        self.wake()
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        seeds = request_seeds(requests)
        params = [
            self._translated(request.params, seed)
            for request, seed in zip(requests, seeds, strict=True)
        ]
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        except Exception as error:  # whatever vLLM raises, unfinished requests stay in its queue
            self.close()
            way_out = (
                f"; {MEMORY_KNOBS}"
                if isinstance(error, torch.OutOfMemoryError)
                else ", or set rollout.engine=hf"
            )
            raise EngineError(
                f"vLLM failed while sampling and has been shut down: {type(error).__name__}: {error}. Restart the run "
                f"from its checkpoint{way_out}"
            ) from error
        completions = []
        for request, output in zip(requests, outputs, strict=True):
            found = [
                self._completion(sampled)
                for sampled in sorted(output.outputs, key=lambda o: o.index)
            ]
            completions.append(
                found * request.params.n if request.params.temperature == 0 else found
            )
        return completions

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by the stream and take `version`.

        The stream is consumed tensor by tensor, so nothing can be undone: when it turns out to be incomplete, the
        engine raises and refuses to `generate` until a complete one has arrived.

        Raises:
            EngineError: names are missing, unknown or double, a shape differs, or vLLM failed.
        """
        if self._llm is None:
            raise EngineError("the vLLM engine is closed; build a new one")
        self.wake()
        self._unusable = f"the update to version {version} did not complete"
        stream = _Exhausted(self._manifest.checked(weights))
        try:
            with torch.no_grad():
                self._llm.collective_rpc(
                    "reload_weights", kwargs={"weights_iterator": iter(stream)}
                )
        except EngineError:
            raise
        except (
            Exception
        ) as error:  # anything vLLM raises leaves the same half-loaded engine, and is re-raised
            raise EngineError(
                f"vLLM failed during the update to version {version}: {type(error).__name__}: {error}. Send the "
                "complete weights again, or restart the run from its checkpoint"
            ) from error
        if not stream.exhausted:
            raise EngineError(
                f"vLLM stopped reading before the end of the weights of version {version}; this version of vLLM does "
                "not take an update in one stream, use rollout.engine=hf"
            )
        if self._on_cpu:
            self._llm.apply_model(_dispatch_head_anew)
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(str(version))
        self._version = version
        self._unusable = None

    def sleep(self) -> None:
        """On GPU, move the weights to main memory and drop keys and values; on CPU nothing is freed."""
        if self._llm is None or self._on_cpu or self._asleep:
            return
        self._llm.sleep(level=1)
        self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._llm is not None and self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Shut vLLM down and free its memory. Safe to call twice."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        self._folder.cleanup()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _usable(self) -> "vllm.LLM":
        """The engine, unless its weights are not the policy's."""
        if self._llm is None:
            raise EngineError("the vLLM engine is closed; build a new one")
        if self._unusable:
            raise EngineError(
                f"the vLLM engine holds incomplete weights: {self._unusable}. Call load_weights with the complete "
                "weights before sampling"
            )
        return self._llm

    def _translated(self, params: SamplingParams, seed: int) -> "vllm.SamplingParams":
        """The same request in vLLM's words."""
        import vllm

        return vllm.SamplingParams(
            # Greedy responses of one prompt are equal; vLLM refuses to compute more than one.
            n=1 if params.temperature == 0 else params.n,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_new_tokens,
            stop=list(params.stop),
            stop_token_ids=sorted(self._ends | set(params.stop_token_ids)),
            seed=seed,
            logprobs=0,
            detokenize=bool(params.stop),
            skip_special_tokens=False,
        )

    def _completion(self, output: "vllm.CompletionOutput") -> Completion:
        """One of vLLM's outputs in our words."""
        if output.finish_reason not in ("stop", "length") or output.logprobs is None:
            raise EngineError(
                f"vLLM ended a response with {output.finish_reason!r}; expected 'stop' or 'length'. "
                "Its log has the cause"
            )
        token_ids = tuple(output.token_ids)
        return Completion(
            token_ids=token_ids,
            logprobs=tuple(
                at[token].logprob  # type: ignore[index]
                for token, at in zip(token_ids, output.logprobs, strict=True)
            ),
            finish=Finish.STOP if output.finish_reason == "stop" else Finish.LENGTH,
            policy_version=self._version,
        )


class _Exhausted:
    """An iterable that knows whether it was read to the end."""

    def __init__(self, items: Iterator[tuple[str, Tensor]]) -> None:
        self._items = items
        self.exhausted = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._items
        self.exhausted = True


def _generation_config(model: str, revision: str | None) -> GenerationConfig | None:
    """The checkpoint's generation config, if it has one."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return None


def _import_vllm() -> bool:
    """Import vLLM and switch off what does not survive an update; returns whether it computes on CPU."""
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise EngineError(NOT_INSTALLED) from error
        raise EngineError(
            f"vLLM is installed but does not import: {error}; {NOT_INSTALLED}"
        ) from error
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise EngineError(
            f"torchvision does not fit the installed torch ({error}), and vLLM and transformers import it; nothing "
            "here needs it: `pip uninstall -y torchvision torchaudio torchcodec`"
        ) from error
    if not current_platform.is_cpu():
        return False
    from vllm import _custom_ops

    if hasattr(_custom_ops, "_supports_onednn"):  # a private name of vLLM, absent in other versions
        _custom_ops._supports_onednn = False
    else:
        logger.warning(
            "this version of vLLM packs weights in a way llmac does not know; rely on the start-up probe"
        )
    return True


def _build(options: dict[str, Any]) -> "vllm.LLM":
    """`vllm.LLM(**options)`, with the knob to turn in the error when memory does not suffice."""
    import vllm

    try:
        return vllm.LLM(**options)
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "memory" in text or "kv cache" in text:
            raise EngineError(
                f"vLLM does not find enough memory to start: {error}; {MEMORY_KNOBS}"
            ) from error
        raise EngineError(
            f"vLLM does not start on {options['model']}: {type(error).__name__}: {error}"
        ) from error


def _dispatch_head_anew(model: nn.Module) -> None:
    """Let a tied output layer forget the weights it packed when it was built (CPU only)."""
    head = getattr(
        model, "lm_head", None
    )  # the layer's name in vLLM's models; absent in embedding models
    if head is None or not hasattr(head, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)


@contextlib.contextmanager
def _process_state_restored() -> Iterator[None]:
    """Put back what building vLLM changes for everybody else: environment, threads, random states."""
    environment = dict(os.environ)
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy_state = _numpy_random().get_state()
    # In process, so that weights arrive by reference; and no compiler for the few functions sampling calls on CPU.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        _numpy_random().set_state(numpy_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _numpy_random() -> Any:
    """The global random module of numpy, typed loosely because its state has no public type."""
    import numpy

    return numpy.random
