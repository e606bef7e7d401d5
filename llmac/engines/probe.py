"""Proof that an engine samples from the policy it is said to hold.

An engine that silently keeps an old layer goes on producing fluent text with plausible log-probabilities; training then
optimises one policy with the samples of another. Nothing in the weights' journey reports it, so it is measured:
sample a few tokens, and let somebody who certainly has the right weights say how likely they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llmac.core.protocols import Request, RolloutEngine, SamplingParams
from llmac.errors import EngineError

Reference = Callable[[Sequence[int], Sequence[int]], Sequence[float]]
"""(prompt_ids, response_ids) -> log π of each response token at temperature 1, by the right weights."""
WeightStream = Iterable[tuple[str, Tensor]]
ReferenceFor = Callable[[WeightStream | None], Reference]
"""A `Reference` computing with the given weights; None: with the policy's own."""

PROBE_TOKENS = 16
PERTURBATION = 0.1
"""Noise added to every weight, as a fraction of the root mean square of its tensor."""
TOLERANCE = 1e-3
"""Mean |log μ - log π| allowed when engine and reference compute in float32; what is measured there is below 1e-5."""
LOW_PRECISION_TOLERANCE = 0.05
"""The same when one of them computes in bfloat16 or float16. A guess: not yet measured on a GPU."""


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


def prove_updates_arrive(
    engine: RolloutEngine,
    weights: Callable[[], WeightStream],
    reference_for: ReferenceFor,
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
        weights: a new stream of the policy's weights, each time it is called.
        reference_for: says log π with given weights; `module_reference` makes one of a plain module.
        prompts: one or two are enough.
        tolerance: see `check_engine_holds`.
        seed: of the noise and of the sampling.

    Returns:
        The mean differences with perturbed ("perturbed") and with true weights ("restored").

    Raises:
        EngineError: an update did not arrive completely.
    """
    version = engine.policy_version
    engine.load_weights(perturbed(weights(), seed), version)
    changed = check_engine_holds(
        engine,
        reference_for(perturbed(weights(), seed)),
        prompts,
        tolerance=tolerance,
        when="start-up probe, every weight changed",
        seed=seed,
    )
    engine.load_weights(weights(), version)
    restored = check_engine_holds(
        engine,
        reference_for(None),
        prompts,
        tolerance=tolerance,
        when="start-up probe, weights restored",
        seed=seed,
    )
    return {"perturbed": changed, "restored": restored}


def perturbed(weights: WeightStream, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The same stream with noise on every weight that depends only on the seed and the place in the stream.

        w' = w + 0.1 · rms(w) · ε,    ε ~ N(0, 1);    rms of an all-zero tensor counts as 1

    >>> [(name, x)] = perturbed([("w", torch.ones(2))], seed=0)
    >>> name, bool((x != 1).all())
    ('w', True)
    """
    for place, (name, tensor) in enumerate(weights):
        generator = torch.Generator().manual_seed(1_000_003 * seed + place)
        noise = torch.randn(tensor.shape, generator=generator)
        scale = tensor.float().square().mean().sqrt()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        yield (
            name,
            (tensor.float() + PERTURBATION * scale * noise.to(tensor.device)).to(tensor.dtype),
        )


def module_reference(model: nn.Module) -> ReferenceFor:
    """References that run a transformers causal LM, in this process and not sharded, over prompt and response.

    Args:
        model: dropout must be off; it is not changed.
    """

    def reference_for(stream: WeightStream | None) -> Reference:
        weights = dict(stream) if stream is not None else {}

        @torch.no_grad()
        def reference(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
            ids = torch.tensor(
                [[*prompt_ids, *response_ids]], device=next(model.parameters()).device
            )
            logits = torch.func.functional_call(model, weights, kwargs={"input_ids": ids}).logits
            logprobs = logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(dim=-1)
            return logprobs.gather(1, ids[0, len(prompt_ids) :, None]).squeeze(1).tolist()

        return reference

    return reference_for
