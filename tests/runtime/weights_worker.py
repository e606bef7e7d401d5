"""Trains sharded models on two processes and checks what they stream; started by test_weights_sharded.py."""

import copy
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmac.runtime.weights import full_weights
from tests.runtime.live_bytes import LiveBytes

SMALL: dict[str, Any] = {
    "vocab_size": 33,  # odd, so that ranks have unequal shares
    "hidden_size": 18,
    "intermediate_size": 25,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
ADAPTERS = {
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
}
KILOBYTE = 1024

Trained = tuple[nn.Module, nn.Module]
"""The sharded model, and a whole one that has learned the same."""


def qwen2(*, tied: bool = False, **changed: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{**SMALL, **changed}, tie_word_embeddings=tied))


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    # Grouped matrix products want rows of 16 bytes.
    sizes = {**SMALL, "hidden_size": 24, "intermediate_size": 20}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2))


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, **(options or ADAPTERS)))  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # Products with a power of two are exact: no order of operations changes a bit.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2**-3)


def two_steps(
    model: nn.Module, backward: Callable[[Tensor], None], step: Callable[[], None]
) -> None:
    # The same rows on both ranks: the mean of their gradients is exactly one rank's.
    ids = torch.randint(1, 33, (2, 9), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        backward(model(input_ids=ids, labels=ids).loss)
        step()


def trained_whole(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = sgd(model)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    two_steps(model, lambda loss: loss.backward(), step)
    return model


def deepspeed_trained(model: nn.Module, stage: int, **options: Any) -> Trained:
    import deepspeed

    whole = trained_whole(model)
    optimizer = sgd(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # not the default
        "zero_optimization": {"stage": stage, **options},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    two_steps(engine, engine.backward, engine.step)
    return engine, whole


def fsdp2_trained(model: nn.Module) -> Trained:
    whole = trained_whole(model)
    mesh = init_device_mesh("cpu", (2,))
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in bare.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    two_steps(model, lambda loss: loss.backward(), step)
    return model, whole


def zero3(model: nn.Module, **options: Any) -> Trained:
    # Some parameters (norms, biases) stay whole on every rank, others are fetched ahead.
    return deepspeed_trained(model, 3, stage3_param_persistence_threshold=20, **options)


CASES: dict[str, Callable[[], Trained]] = {
    "zero1": lambda: deepspeed_trained(qwen2(), 1),
    "zero2 tied": lambda: deepspeed_trained(qwen2(tied=True), 2),
    "zero3": lambda: zero3(qwen2()),
    "zero3 tied": lambda: zero3(qwen2(tied=True)),
    "zero3 lora": lambda: zero3(with_lora(qwen2())),
    "zero3 experts": lambda: zero3(mixtral()),
    "zero3 offloaded": lambda: zero3(qwen2(), offload_param={"device": "cpu"}),
    "fsdp2": lambda: fsdp2_trained(qwen2()),
    "fsdp2 tied": lambda: fsdp2_trained(qwen2(tied=True)),
    "fsdp2 lora": lambda: fsdp2_trained(with_lora(qwen2())),
    "fsdp2 experts": lambda: fsdp2_trained(mixtral()),
}


def copied(stream: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream}


def learns_what_one_process_learns(model: nn.Module, whole: nn.Module) -> None:
    """By DeepSpeed's and torch's own gathering; then takes away what rounding has put between the two."""
    sharded = dict((model.module if hasattr(model, "module") else model).named_parameters())
    for name, parameter in whole.named_parameters():
        with all_of(sharded[name]) as learned, torch.no_grad():
            torch.testing.assert_close(learned, parameter, rtol=1e-5, atol=1e-6, msg=name)
            parameter.copy_(learned)


@contextmanager
def all_of(parameter: Tensor) -> Iterator[Tensor]:
    import deepspeed

    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    else:
        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data


def streams_what_was_learned(model: nn.Module, whole: nn.Module) -> None:
    want = copied(full_weights(whole))
    for bucket_bytes in (1, 4 * KILOBYTE, 1 << 30):  # one tensor a bucket, a few, all
        got = copied(full_weights(model, bucket_bytes=bucket_bytes))
        assert list(got) == list(want), (list(got), list(want))
        for name in want:
            assert torch.equal(got[name], want[name]), (
                f"{name}, bucket {bucket_bytes}: {(got[name] - want[name]).abs().max()}"
            )
    held = dict(full_weights(model, bucket_bytes=4 * KILOBYTE))  # beyond their buckets
    assert all(torch.equal(held[name], want[name]) for name in want)
    del held
    low = copied(full_weights(model, dtype=torch.bfloat16))
    assert all(torch.equal(low[name], want[name].bfloat16()) for name in want)


def goes_on_learning(model: nn.Module, whole: nn.Module) -> None:
    """A stream, taken whole or not, leaves the trainer as it was."""
    stream = full_weights(model, bucket_bytes=4 * KILOBYTE)
    next(stream)
    stream.close()
    model.eval(), whole.eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    want = copied(full_weights(whole))
    got = copied(full_weights(model))  # after a forward pass, with layers fetched by it
    assert all(torch.equal(got[name], want[name]) for name in want)


WIDE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
}
SENT = {"zero3 lora", "fsdp2"}
"""Also measured where shards cannot be shared."""
MEASURED: dict[str, Callable[[], Trained]] = {
    "zero3": lambda: zero3(qwen2(**WIDE)),
    "zero3 lora": lambda: zero3(with_lora(qwen2(**WIDE), target_modules="all-linear")),
    "fsdp2": lambda: fsdp2_trained(qwen2(**WIDE)),
    "fsdp2 lora": lambda: fsdp2_trained(with_lora(qwen2(**WIDE), target_modules="all-linear")),
}
BUCKET, OVERHEAD = 1 << 20, 16 * KILOBYTE


def stays_within_a_bucket(model: nn.Module, bucket_bytes: int) -> None:
    shared = resident_shared_bytes()
    with LiveBytes() as live:
        for _, tensor in full_weights(model, bucket_bytes=bucket_bytes):
            live.count(tensor)
            del tensor
        assert live.peak <= bucket_bytes + OVERHEAD, f"{live.peak} bytes, bucket {bucket_bytes}"
        assert live.peak >= bucket_bytes / 8, f"{live.peak} bytes: what is measured here?"
        deadline = time.monotonic() + 5  # gloo's threads let go of a buffer when they next run
        while live.now > OVERHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        assert live.now <= OVERHEAD, f"{live.now} bytes left behind"
    kept = resident_shared_bytes() - shared
    assert kept <= bucket_bytes + OVERHEAD, f"{kept} bytes are shared, bucket {bucket_bytes}"


def resident_shared_bytes() -> int:
    """Pages in memory of what the ranks share."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # a mapping's first line: its addresses
            ours = "memfd:llmac weights" in line
        elif ours and line.startswith("Rss:"):
            total += KILOBYTE * int(line.split()[1])
    return total


@contextmanager
def case(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"in case {name!r}, rank {dist.get_rank()}")
        raise
    if dist.get_rank() == 0:
        print(f"{name}: done", flush=True)


def main(part: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    if part == "sent":
        # No file may grow, memory to share neither: ranks have to send their shards.
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for name, build in CASES.items():
        if part == "shared" or name in SENT:
            with case(name):
                model, whole = build()
                learns_what_one_process_learns(model, whole)
                streams_what_was_learned(model, whole)
                goes_on_learning(model, whole)
    for name, build in MEASURED.items():
        if part == "shared" or name in SENT:
            with case(f"memory of {name}"):
                model, _ = build()
                stays_within_a_bucket(model, BUCKET)
    assert (resident_shared_bytes() > 0) == (part == "shared")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
