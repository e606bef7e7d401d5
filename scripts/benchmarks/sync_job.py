"""Streams a random model's weights to a destination and copies as many bytes plainly, in turn; rank 0 writes JSON.

python scripts/benchmarks/sync_job.py PARAMETERS null|vllm BUCKET_MB ROUNDS RESULT.json
One process: the model is whole. Several (torchrun): ZeRO-3 shards it.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llmac.runtime.weights import full_weights

SIZES = {
    "3M": Qwen2Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "100M": Qwen2Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "500M": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
}
"""Qwen2; the largest is Qwen2.5-0.5B's shape."""
SOURCE_BYTES = 256 << 20
"""Of what is copied plainly, over and over: beyond every cache, and no second copy of the model."""

Device = torch.device
Job = Callable[[], None]


def device() -> Device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def shard(model: nn.Module) -> nn.Module:
    """Cut by ZeRO-3, without an optimizer: what it would hold is not what is measured."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def plain_copy(destination: dict[str, Tensor]) -> Job:
    """As many bytes, tensor by tensor, to the same places."""
    largest = max(tensor.numel() for tensor in destination.values())
    total = sum(tensor.numel() for tensor in destination.values())
    length = max(largest, min(total, SOURCE_BYTES // 4))
    source = torch.ones(length, device=device())

    def copy() -> None:
        start = 0
        for tensor in destination.values():
            if start + tensor.numel() > length:
                start = 0
            tensor.view(-1).copy_(source[start : start + tensor.numel()])
            start += tensor.numel()

    return copy


def to_null(model: nn.Module, destination: dict[str, Tensor], bucket_bytes: int) -> Job:
    def drain() -> None:
        for name, tensor in full_weights(model, bucket_bytes=bucket_bytes):
            destination[name].copy_(tensor)

    return drain


def to_vllm(model: nn.Module, folder: str, bucket_bytes: int) -> Job:
    from llmac.engines.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        folder,
        AutoTokenizer.from_pretrained(folder),
        dtype="float32",
        max_model_len=32,
        max_num_seqs=8,
        enforce_eager=True,
    )
    version = iter(range(1, 1 << 20))
    return lambda: engine.load_weights(
        full_weights(model, bucket_bytes=bucket_bytes), next(version)
    )


def save(model: nn.Module, folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b", pad_token="b").save_pretrained(
        folder
    )
    model.save_pretrained(folder)


def from_first_rank(folder: str) -> str:
    sent = [folder]
    if dist.is_initialized():
        dist.broadcast_object_list(sent)
    return sent[0]


def barrier() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def seconds(job: Job) -> float:
    """Until the last rank is done."""
    barrier()
    begun = time.perf_counter()
    job()
    barrier()
    return time.perf_counter() - begun


class PeakMemory:
    """Bytes above those at the start: the GPU's allocator, or resident pages (Linux only)."""

    def __init__(self) -> None:
        self._gpu = device().type == "cuda"
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident("VmRSS")

    def above(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self._gpu else self._resident("VmHWM")
        return peak - self._before

    def _resident(self, field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])


def main(size: str, where: str, bucket_mb: int, rounds: int, result: Path) -> None:
    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    model: nn.Module = Qwen2ForCausalLM(SIZES[size]).to(device())
    shapes = {name: (t.shape, t.dtype) for name, t in full_weights(model)}
    with tempfile.TemporaryDirectory() as folder:
        if where == "vllm":
            folder = from_first_rank(folder)
            if rank == 0:
                save(model, folder)
            barrier()
        if dist.is_initialized():
            model = shard(model)
        destination = {
            name: torch.zeros(shape, dtype=dtype, device=device())
            for name, (shape, dtype) in shapes.items()
        }
        copy = plain_copy(destination)
        if where == "null":
            stream = to_null(model, destination, bucket_mb << 20)
        else:
            stream = to_vllm(model, folder, bucket_mb << 20)
        torch.set_num_threads(threads)  # what was imported may have changed it
        memory = PeakMemory()
        stream()
        above = memory.above()
        copy()
        measured = [(seconds(stream), seconds(copy)) for _ in range(rounds)]
        if rank == 0:
            found = {
                "bytes": sum(tensor.nbytes for tensor in destination.values()),
                "parameters": sum(tensor.numel() for tensor in destination.values()),
                "stream_seconds": [stream for stream, _ in measured],
                "copy_seconds": [copy for _, copy in measured],
                "above_shards_bytes": above,
                "device": str(device()),
            }
            result.write_text(json.dumps(found))
        barrier()
    # What vLLM and DeepSpeed leave behind at exit is not measured; it may not fail the job either.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
