"""Who samples: the engine of a recipe's policy, and those of other models beside it."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmac.config import Recipe
from llmac.core.protocols import Player, RolloutEngine
from llmac.data.tokenizing import encoder
from llmac.engines.readiness import SleepLevel
from llmac.errors import ConfigError
from llmac.models.loading import ModelSpec, context_length, load_causal_lm, load_tokenizer
from llmac.runtime.context import Runtime


class Engines:
    """All engines of a run on this rank: they sleep and end together."""

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        """Nothing is loaded yet."""
        self._recipe, self._runtime = recipe, runtime
        self._all: list[RolloutEngine] = []

    def of_policy(self, tokenizer: PreTrainedTokenizerBase, *, longest: int | None) -> Player:
        """The policy's.

        Args:
            tokenizer: the policy's.
            longest: tokens of a prompt and its response together; None: whatever the model can take.
        """
        level = self._recipe.rollout.sleep_level
        return self._added(self._recipe.model, tokenizer, longest=longest, sleep_level=level)

    def of_other(self, model: ModelSpec, *, longest: int | None = None) -> Player:
        """Another model's, with settings of the recipe's `rollout` section.

        In vLLM it never sleeps: the allocator that can serves one engine a process, and that is the policy's.

        Args:
            model: which; its tokenizer is its own.
            longest: as in `of_policy`.

        Raises:
            ConfigError: servers sample, which serve one model.
        """
        if self._recipe.rollout.engine == "vllm_server":
            raise ConfigError(
                f"{model.name} is a second model to sample from, and rollout.engine is vllm_server, whose servers "
                "have the policy; set rollout.engine: vllm or hf"
            )
        tokenizer = load_tokenizer(model)
        return self._added(model, tokenizer, longest=longest, sleep_level=0)

    def sleep(self) -> None:
        """Free accelerator memory until somebody is asked."""
        for engine in self._all:
            engine.sleep()

    def close(self) -> None:
        """Release everything. Safe to call twice."""
        for engine in self._all:
            engine.close()

    def _added(
        self,
        model: ModelSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int | None,
        sleep_level: SleepLevel,
    ) -> Player:
        engine = _engine(
            self._recipe, model, tokenizer, self._runtime, longest=longest, sleep_level=sleep_level
        )
        self._all.append(engine)
        rooms = (context_length(model), self._recipe.rollout.max_model_len, longest)
        limit = min((room for room in rooms if room is not None), default=None)
        return dataclasses.replace(speaking(engine, tokenizer), limit=limit)


def speaking(engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase) -> Player:
    """An engine with the words of its tokenizer."""
    return Player(
        engine=engine,
        encode=encoder(tokenizer),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)),
        read=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        spell=lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )


def engine_dtype(recipe: Recipe) -> torch.dtype:
    """What the engine computes in: the trainer's precision, unless the recipe wants vLLM in another."""
    spec, rollout = recipe.model, recipe.rollout
    trainer = spec.compute_dtype or spec.dtype
    name = trainer if rollout.engine == "hf" or rollout.dtype == "auto" else rollout.dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _engine(
    recipe: Recipe,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    *,
    longest: int | None,
    sleep_level: SleepLevel,
) -> RolloutEngine:
    rollout = recipe.rollout
    if rollout.engine == "hf":
        from llmac.engines.hf_engine import HFEngine

        # In the precision the trainer computes in: the sampler should be the policy, not a better-rounded one.
        model = load_causal_lm(spec, dtype=engine_dtype(recipe))
        torch.nn.Module.to(model, runtime.device)
        return HFEngine(model, tokenizer, max_batch_rows=rollout.max_num_seqs)
    shared: dict[str, Any] = {  # keyword arguments of both, whose types vary
        "max_num_seqs": rollout.max_num_seqs,
        "trust_remote_code": spec.trust_remote_code,
        "revision": spec.revision,
    }
    if rollout.engine == "vllm_server":
        from llmac.engines.vllm_server import VLLMServerEngine
        from llmac.serve import local_servers, sender_of

        trainers = runtime.local_world_size
        return VLLMServerEngine(
            spec.name,
            tokenizer,
            runtime,
            sender=lambda: sender_of(recipe),
            servers=rollout.servers,
            launch=lambda: local_servers(
                recipe, Path(recipe.run.output), first_gpu=trainers, longest=longest
            ),
            request_timeout_seconds=rollout.request_timeout_seconds,
            **shared,
        )
    from llmac.engines.vllm_engine import VLLMEngine

    return VLLMEngine(
        spec.name,
        tokenizer,
        dtype=str(engine_dtype(recipe)).removeprefix("torch."),
        # Room for what can come, not for the whole context of the architecture.
        max_model_len=rollout.max_model_len or longest,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_mb=rollout.kv_cache_mb,
        enforce_eager=rollout.enforce_eager,
        tensor_parallel_size=rollout.tensor_parallel_size,
        sleep_level=sleep_level,
        **shared,
    )
