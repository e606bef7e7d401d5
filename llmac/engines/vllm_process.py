"""vLLM as a guest in the training process: imported, built and shut down so that training does not notice.

Building an engine on CPU replaces `torch.set_num_threads` by a function that does nothing, sets the threads to 1,
reseeds the random states and edits the environment; shutting one down destroys the process group of the whole job. All
of it is put back here. What vLLM packs when it loads weights on CPU is switched off, as far as it can be.
"""

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from llmac.errors import EngineError

if TYPE_CHECKING:
    import vllm

logger = logging.getLogger(__name__)

NOT_INSTALLED = (
    "rollout.engine is vllm, but vLLM is not installed here; run `pip install llmac[rollout]` on a machine with GPUs "
    "or `pip install llmac[cpu]` without, or set rollout.engine=hf"
)
MEMORY_KNOBS = (
    "lower rollout.max_model_len or rollout.max_num_seqs; give the engine more with rollout.gpu_memory_utilization "
    "(GPU) or rollout.kv_cache_mb; or lower actor.max_tokens_per_microbatch if training holds the memory"
)

CPU_BLOCK_TOKENS = 32
"""Tokens of a prompt that are cached or not together on CPU, where vLLM would take 128: the least it is fast with."""


def import_vllm() -> bool:
    """Import vLLM and switch off what does not survive an update; returns whether it computes on CPU.

    Raises:
        EngineError: it is missing or does not import.
    """
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


def build(options: dict[str, Any], *, shared_name: str | None = None) -> "vllm.LLM":
    """`vllm.LLM(**options)`, with the knob to turn in the error when memory does not suffice.

    Args:
        options: keyword arguments of `vllm.LLM`.
        shared_name: on CPU, a part of the name of the memory a tensor parallel group shares: equal in the group,
            different from that of any other job on this machine.

    Raises:
        EngineError: vLLM does not start.
    """
    import vllm

    try:
        with _shared_memory_named(shared_name):
            return vllm.LLM(**options)
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        if is_about_memory(error):
            raise EngineError(
                f"vLLM does not find enough memory to start: {error}; {MEMORY_KNOBS}"
            ) from error
        raise EngineError(
            f"vLLM does not start on {options['model']}: {type(error).__name__}: {error}"
        ) from error


def shut_down(llm: "vllm.LLM", *, keep_group: bool) -> None:
    """End an engine.

    Args:
        llm: what `build` returned.
        keep_group: leave torch.distributed's default group alone, as it was there before the engine.
    """
    with _default_group_kept() if keep_group else contextlib.nullcontext():
        llm.llm_engine.engine_core.shutdown()


def is_about_memory(error: Exception) -> bool:
    """Whether an error of vLLM says that memory did not suffice: on GPU it has a type, elsewhere words.

    >>> is_about_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    True
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "memory" in text or "kv cache" in text


@contextlib.contextmanager
def process_state_restored() -> Iterator[None]:
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


@contextlib.contextmanager
def _shared_memory_named(name: str | None) -> Iterator[None]:
    """Let `name` end the names vLLM gives to shared memory on CPU, which may have slashes at their start only.

    With engines that an external launcher starts, vLLM's own names depend on the ranks alone: a second job on the
    machine, or one that was killed and left its memory behind, would make this one fail ("errno: 17").
    """
    if name is None:
        yield
        return
    from vllm.distributed.device_communicators import cpu_communicator

    # Private names of vLLM, absent in other versions, where names may be unique or not.
    shared: Any = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    own = getattr(shared, "make_group_name", None)
    if own is None:
        yield
        return
    shared.make_group_name = staticmethod(lambda communicator: f"{own(communicator)}-{name}")
    try:
        yield
    finally:
        shared.make_group_name = staticmethod(own)


@contextlib.contextmanager
def _default_group_kept() -> Iterator[None]:
    """Within, `destroy_process_group()` leaves the group of the whole job alone: it belongs to the trainer."""
    destroy = torch.distributed.destroy_process_group

    def destroy_subgroup(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    torch.distributed.destroy_process_group = destroy_subgroup
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def _numpy_random() -> Any:
    """The global random module of numpy, typed loosely because its state has no public type."""
    import numpy

    return numpy.random
