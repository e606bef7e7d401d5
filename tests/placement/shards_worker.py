"""One of two processes: cut a tiny model in every way, take real steps, say how many bytes each part has.

    torchrun --nproc_per_node 2 -m tests.placement.shards_worker <folder>

Rank 0 writes <folder>/measured.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmac.runtime.zero import bucket_sizes

from .measuring import most_alive


def main():
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    config = AutoConfig.from_pretrained(folder)
    measured = {}
    # First of all: DeepSpeed replaces PyTorch's linear function once it has been at stage 3.
    model = cut_along_rows(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    measured["looking"] = {
        name: looking(model, cached)
        for name, cached in {"cached": True, "not cached": False}.items()
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, cut in {"zero1": zero, "zero2": zero, "zero3": zero, "fsdp2": fsdp2}.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            precision = str(dtype).removeprefix("torch.")
            measured[f"{name} {precision}"] = cut(model, dtype, int(name[-1]))
    if distributed.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    distributed.barrier()
    os._exit(0)  # DeepSpeed's own clean-up is not what is tested


def zero(model, dtype, stage):
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1]},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, **bucket_sizes(model.config.hidden_size)},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, inner, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(loss_of(engine))
    # Stage 1 accumulates whole gradients, and reduces them after the last micro-batch.
    whole = [p.grad for p in model.parameters() if p.grad is not None]
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine))
    if stage == 3:
        shards = [p.ds_tensor for p in model.parameters()]
        gradients = [inner.grad_partitions_flat_buffer]
        copies = list(inner.fp32_partitioned_groups_flat)
    else:
        shards = list(inner.bit16_groups_flat)
        parts = [t for group in inner.averaged_gradients.values() for t in group]
        gradients = parts if stage == 2 else whole
        copies = list(inner.single_partition_of_fp32_groups)
    held_gradients = sum(t.numel() * t.element_size() for t in gradients)
    engine.step()
    state = [t for s in inner.optimizer.state.values() for t in s.values()]
    known = {t.untyped_storage()._cdata for t in shards}
    own_copies = [t for t in copies if t.untyped_storage()._cdata not in known]
    return {
        "parameters": storages(shards),
        "gradients": held_gradients,
        "optimizer": storages([*own_copies, *state]),
    }


def fsdp2(model, dtype, _):
    cut_along_rows(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters()]
    state = [t for s in optimizer.state.values() for t in s.values()]
    return {
        "parameters": sum(map(local, model.parameters())),
        "gradients": sum(map(local, gradients)),
        "optimizer": sum(map(local, state)),
    }


def cut_along_rows(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model, reshard_after_forward=True)


def looking(model, cached):
    """The most alive of what a forward pass of few tokens allocates, gathered weights included."""
    ids = torch.arange(8)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        model(input_ids=ids, use_cache=False)  # whatever the first pass leaves behind
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        return most_alive(lambda: model(input_ids=ids, use_cache=False))


def loss_of(model):
    ids = torch.arange(24).view(2, 12)
    return model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()


def storages(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def local(tensor):
    whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return whole.numel() * whole.element_size()


if __name__ == "__main__":
    main()
