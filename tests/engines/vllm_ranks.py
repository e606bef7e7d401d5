"""Two processes train under ZeRO-3 and sample with vLLM, an engine each or one together; see test_vllm_ranks.py."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.probe import ProbedModule, check_engine_holds
from llmac.engines.tensor_parallel import TensorParallelGroup
from llmac.engines.vllm_engine import VLLMEngine
from llmac.errors import ConfigError, EngineError
from llmac.runtime.weights import full_weights

END = 1
NEW_TOKENS = 16
SKIPPED = "model.layers.1.mlp.down_proj.weight"

Prompts = list[tuple[int, ...]]


def trained_three_steps(model: nn.Module, rank: int) -> nn.Module:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rows = torch.Generator().manual_seed(rank)
    for _ in range(3):
        ids = torch.randint(2, 40, (4, 12), generator=rows)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def stream(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Many buckets, so that fused layers are split over them."""
    return full_weights(model, bucket_bytes=96 << 10)


def ask(prompts: Prompts, **params: Any) -> list[Request]:
    return [Request(prompt_ids=prompt, params=SamplingParams(**params)) for prompt in prompts]


def greedy(model: PreTrainedModel, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=END,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


def greedy_answers_are_transformers(
    engine: VLLMEngine, whole: PreTrainedModel, prompts: Prompts
) -> None:
    answers = engine.generate(ask(prompts, temperature=0.0, max_new_tokens=NEW_TOKENS))
    found = [completion.token_ids for (completion,) in answers]
    assert found == [greedy(whole, prompt) for prompt in prompts]


def differences(engine: VLLMEngine, whole: PreTrainedModel, prompts: Prompts) -> Tensor:
    """log π - log μ of every sampled token."""
    reference, found = ProbedModule(whole), []
    answers = engine.generate(ask(prompts, n=2, max_new_tokens=NEW_TOKENS, seed=3))
    for prompt, siblings in zip(prompts, answers, strict=True):
        for completion in siblings:
            said = reference.logprobs_of(prompt, completion.token_ids)
            found += [ours - its for ours, its in zip(said, completion.logprobs, strict=True)]
    return torch.tensor(found).double()


def a_skipped_layer_is_caught(
    engine: VLLMEngine, trained: nn.Module, whole: PreTrainedModel, old: Tensor, prompts: Prompts
) -> float:
    skipping = ((name, old if name == SKIPPED else w) for name, w in stream(trained))
    engine.load_weights(skipping, version=2)
    with pytest.raises(EngineError, match="does not sample from the policy") as caught:
        check_engine_holds(engine, ProbedModule(whole).logprobs_of, prompts)
    with pytest.raises(EngineError, match=f"1 of .* did not arrive: {SKIPPED}"):
        engine.load_weights((pair for pair in stream(trained) if pair[0] != SKIPPED), version=3)
    with pytest.raises(EngineError, match="the update to version 3 did not complete"):
        engine.generate(ask(prompts, max_new_tokens=1))
    return float(str(caught.value).split("differ from the trainer's by ")[1].split(" ")[0])


def a_rank_that_fails_stays_in_step(
    engine: VLLMEngine, trained: nn.Module, rank: int, size: int
) -> None:
    """Rank 1's engine fails in the middle; rank 0 gets its buckets all the same, and the next update heals both."""
    good = stream(trained)
    if rank == 1:
        bad = ((name, w[:1] if name == SKIPPED else w) for name, w in good)
        with pytest.raises(EngineError, match="arrived with shape"):
            engine.load_weights(bad, version=4)
    else:
        engine.load_weights(good, version=4)
    requests = ask([(5, 6)], max_new_tokens=2)
    if rank == 1:
        with pytest.raises(EngineError, match="the update to version 4 did not complete"):
            engine.generate(requests)
    elif size == 2:
        with pytest.raises(EngineError, match=r"rank 1, which shares this engine.*version 4"):
            engine.generate(requests)
    else:
        engine.generate(requests)
    engine.load_weights(stream(trained), version=5)


def neighbours_get_their_own_answers(engine: VLLMEngine, rank: int) -> None:
    requests = ask([(5, 6, 7), (8, 9)], n=2, max_new_tokens=12, seed=11)
    together = engine.generate(requests)
    # Equal questions with equal seeds have equal answers, whoever asks.
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, together)
    assert everyone[0] == everyone[1]
    # A rank may have nothing to ask; what its neighbour gets does not depend on it.
    assert engine.generate(requests if rank else []) == (together if rank else [])
    with pytest.raises(EngineError, match=r"may reach 1\d\d tokens") as refused:
        engine.generate(ask([(5,) * (100 if rank else 3)], max_new_tokens=40))
    assert ("rank 1, which shares this engine" in str(refused.value)) == (rank == 0)
    assert engine.generate(requests) == together


def main(folder: str, size: int) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, but the job has 2 processe"):
        TensorParallelGroup(3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    old = model.get_parameter(SKIPPED).detach().clone()
    trained = trained_three_steps(model, rank)
    engine = VLLMEngine(folder, AutoTokenizer.from_pretrained(folder), tensor_parallel_size=size)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for name, weight in stream(trained):
            whole.get_parameter(name).copy_(weight)

    drawn = torch.Generator().manual_seed(7)
    prompts = [
        tuple(torch.randint(2, 40, (3 + i % 6,), generator=drawn).tolist()) for i in range(64)
    ]
    # One engine each: each answers all 64. One together: each rank asks its own, unequally many.
    mine = prompts if size == 1 else [prompts[:40], prompts[40:]][rank]

    with pytest.raises(EngineError, match="does not sample from the policy"):  # still untrained
        check_engine_holds(engine, ProbedModule(whole).logprobs_of, mine[:4])
    engine.load_weights(stream(trained), version=1)
    greedy_answers_are_transformers(engine, whole, mine)
    after_update = differences(engine, whole, mine)
    skipped = a_skipped_layer_is_caught(engine, trained, whole, old, mine[:4])
    a_rank_that_fails_stays_in_step(engine, trained, rank, size)
    assert engine.policy_version == 5
    greedy_answers_are_transformers(engine, whole, mine)
    healed = differences(engine, whole, mine)
    if size == 2:
        neighbours_get_their_own_answers(engine, rank)

    engine.close()
    dist.barrier()  # the job's process group outlives the engine
    found = torch.stack(
        [healed.abs().mean(), healed.abs().max(), after_update.abs().max(), torch.tensor(skipped)]
    )
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    report = dict(
        zip(["mean", "max", "max_before_failure", "skipped"], found.tolist(), strict=True)
    )
    Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
