"""Proof that an engine samples from the policy it is said to hold.

An engine that silently keeps an old layer goes on producing fluent text with plausible log-probabilities; training then
optimises one policy with the samples of another. Nothing in the weights' journey reports it, so it is measured:
sample a few tokens, and let somebody who certainly has the right weights say how likely they are.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from llmac.core.protocols import Request, RolloutEngine, SamplingParams
from llmac.errors import EngineError
from llmac.runtime.perturbation import perturbed

Reference = Callable[[Sequence[int], Sequence[int]], Sequence[float]]
"""(prompt_ids, response_ids) -> log π of each response token at temperature 1, by the right weights."""
WeightStream = Iterable[tuple[str, Tensor]]

PROBE_TOKENS = 16
TOLERANCE = 1e-3
"""Mean |log μ - log π| allowed when engine and reference compute in float32; what is measured there is below 1e-5."""
LOW_PRECISION_TOLERANCE = 0.05
"""The same when one of them computes in bfloat16 or float16. On CPU 0.022 was measured; on a GPU nothing yet."""


def sampler_difference(
    engine: RolloutEngine, reference: Reference, prompts: Sequence[Sequence[int]], *, seed: int = 0
) -> float:
    """Mean |log μ(a_t|s_t) - log π(a_t|s_t)| over a few sampled tokens of each prompt.

    Costs one short call of the engine and one forward pass of the reference a prompt; consumes no random state.

    Args:
        engine: the engine under test.
        reference: says log π with the weights the engine should hold.
        prompts: token ids to continue.
        seed: of the sampling.
    """
    params = SamplingParams(max_new_tokens=PROBE_TOKENS, seed=seed)
    completions = engine.generate(
        [Request(prompt_ids=tuple(prompt), params=params) for prompt in prompts]
    )
    differences = [
        abs(said - expected)
        for prompt, (completion,) in zip(prompts, completions, strict=True)
        for said, expected in zip(
            completion.logprobs, reference(prompt, completion.token_ids), strict=True
        )
    ]
    return sum(differences) / len(differences)


def check_engine_holds(
    engine: RolloutEngine,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: float = TOLERANCE,
    when: str = "now",
    seed: int = 0,
) -> float:
    """Raise unless the engine samples from the reference's policy.

    Returns:
        The mean difference found.

    Raises:
        EngineError: it is above `tolerance`, or not a number.
    """
    difference = sampler_difference(engine, reference, prompts, seed=seed)
    if not difference <= tolerance:
        raise EngineError(
            f"{type(engine).__name__} does not sample from the policy ({when}): its log-probabilities differ from the "
            f"trainer's by {difference:.3g} on average, allowed are {tolerance:.3g}. Some weights did not reach it, or "
            "the two compute in different precision: set rollout.dtype to the trainer's, or use rollout.engine=hf"
        )
    return difference


class Probed(Protocol):
    """A policy whose weights can be changed for a moment: `Actor`, or a plain model in `ProbedModule`."""

    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Log π of each response token at temperature 1, by the weights of this moment."""
        ...

    def perturbed(self) -> AbstractContextManager[None]:
        """Inside, every weight is another one; afterwards all are what they were."""
        ...


def prove_updates_arrive(
    engine: RolloutEngine,
    weights: Callable[[], WeightStream],
    policy: Probed,
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, float]:
    """Start-up proof: every weight is changed, sent, and seen to have arrived; then the true weights are put back.

    A comparison without changing the weights proves nothing: an engine that drops every update agrees perfectly with a
    trainer that has not learned yet. With every tensor changed, a single one that stays behind shows.

    Args:
        engine: the engine under test; it ends with the true weights and the `policy_version` it had.
        weights: a fresh stream of the policy's weights of this moment.
        policy: who is sampled from.
        prompts: token ids to continue.
        tolerance: mean difference of log-probabilities that counts as rounding.
        seed: of the sampling.

    Returns:
        The mean differences with perturbed ("perturbed") and with true weights ("restored").

    Raises:
        EngineError: the engine does not hold what it was sent.
    """
    version = engine.policy_version
    with policy.perturbed():
        engine.load_weights(weights(), version)
        changed = check_engine_holds(
            engine,
            policy.logprobs_of,
            prompts,
            tolerance=tolerance,
            when="start-up probe, every weight changed",
            seed=seed,
        )
    engine.load_weights(weights(), version)
    restored = check_engine_holds(
        engine,
        policy.logprobs_of,
        prompts,
        tolerance=tolerance,
        when="start-up probe, weights restored",
        seed=seed,
    )
    return {"perturbed": changed, "restored": restored}


class ProbedModule:
    """A transformers causal language model in this process, whole, as `Probed`."""

    def __init__(self, model: nn.Module) -> None:
        """Take a model whose dropout is off."""
        self._model = model

    @torch.no_grad()
    def logprobs_of(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """One forward pass over prompt and response."""
        device = next(self._model.parameters()).device
        ids = torch.tensor([[*prompt_ids, *response_ids]], device=device)
        logits = self._model(input_ids=ids).logits
        logprobs = logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(dim=-1)
        return logprobs.gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1).tolist()

    def perturbed(self) -> AbstractContextManager[None]:
        """Noise on every weight."""
        return perturbed(self._model, seed=0, rank=0)
