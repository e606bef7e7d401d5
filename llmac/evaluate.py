"""How good the policy is on prompts it does not learn from: pass@k, rewards, lengths."""

import contextlib
import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator, Sequence

import numpy
import torch

from llmac.core.diagnostics import pass_at_k
from llmac.core.measures import Mean, Measure, Metrics
from llmac.core.protocols import Request, RolloutEngine, SamplingParams, Scorer
from llmac.core.types import AllSum, Finish, Prompt, Trajectory, identity
from llmac.errors import DataError, RewardError

TOLERANCE = 1e-6
"""Slack of `solved_at`, unit of reward: 0.7 + 0.2 + 0.1 is not 1.0 in floating point."""


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    score: Scorer,
    *,
    sampling: SamplingParams,
    name: str,
    solved_at: float = 1.0,
    sum_across: AllSum = identity,
) -> Metrics:
    """Answer every prompt `sampling.n` times and say how well.

    With n responses to a prompt, c of them solved, averaged over prompts:

        pass@k = 1 - C(n-c, k) / C(n, k),       k = 1, 2, 4, ... up to n

    the unbiased estimate of solving the prompt in k attempts (Chen et al. 2021, arXiv:2107.03374,
    eq. 1); pass@1 is the accuracy. A response is solved if its total reward (weighted sum over the
    functions) is at least `solved_at`.

    The responses depend on the weights, the prompts' ids and `sampling.seed` (None: 0), not on how
    prompts are sharded or on what was sampled before; the random state of training is the same
    after as before.

    Args:
        engine: holds the policy to evaluate.
        prompts: this rank's share; may be empty as long as another rank's is not.
        score: sets the rewards. Give it counters of its own: training's would count evaluation too.
        sampling: temperature 0 for greedy.
        name: of the set, in the names of the metrics.
        solved_at: total reward of a solved response; lower it where the best reward is below 1.
        sum_across: sums over ranks; every rank calls.

    Returns:
        Means that combine exactly over ranks: `eval/<name>/pass@<k>`, `eval/<name>/reward`,
        `eval/<name>/reward/<f>` for each reward function (over the responses it applies to; absent
        if there are none), `eval/<name>/response_length/mean` and
        `eval/<name>/response_length/clip_ratio`.

    Raises:
        DataError: no rank has a prompt.
        RewardError: the scorer left a response without reward.
    """
    if not sum_across(torch.tensor(len(prompts))):
        raise DataError(
            f"the evaluation set {name} has no prompts; give it some or leave evaluation out"
        )
    seed = 0 if sampling.seed is None else sampling.seed
    with _own_randomness(seed):
        requests = [
            Request(
                prompt_ids=p.token_ids,
                params=dataclasses.replace(sampling, seed=_seed(seed, p, sampling)),
            )
            for p in prompts
        ]
        answers = engine.generate(requests)
        trajectories = score(
            [
                Trajectory(
                    prompt=prompt,
                    response_ids=completion.token_ids,
                    action_mask=(True,) * len(completion.token_ids),
                    sampler_logprobs=completion.logprobs,
                    finish=completion.finish,
                    group=group,
                    policy_version=completion.policy_version,
                )
                for group, (prompt, completions) in enumerate(zip(prompts, answers, strict=True))
                for completion in completions
            ]
        )
    metrics = {
        **_pass_at_k(trajectories, len(prompts), sampling.n, solved_at),
        **_means(trajectories),
    }
    return {f"eval/{name}/{what}": measure for what, measure in metrics.items()}


def _pass_at_k(
    trajectories: Sequence[Trajectory], prompts: int, n: int, solved_at: float
) -> dict[str, Measure]:
    solved = [0] * prompts
    for t in trajectories:
        if t.reward is None:
            raise RewardError(
                f"the scorer gave the response to prompt {t.prompt.id} no reward; "
                "evaluation needs one"
            )
        solved[t.group] += t.reward >= solved_at - TOLERANCE
    ks = [2**power for power in range(n.bit_length())]
    return {
        f"pass@{k}": Mean(math.fsum(pass_at_k(n, c, k) for c in solved), float(prompts)) for k in ks
    }


def _means(trajectories: Sequence[Trajectory]) -> dict[str, Measure]:
    count = float(len(trajectories))
    means: dict[str, Measure] = {
        "reward": Mean(math.fsum(t.reward or 0.0 for t in trajectories), count),
        "response_length/mean": Mean(math.fsum(len(t.response_ids) for t in trajectories), count),
        "response_length/clip_ratio": Mean(
            math.fsum(t.finish is Finish.LENGTH for t in trajectories), count
        ),
    }
    for function in dict.fromkeys(f for t in trajectories for f in t.reward_parts):
        parts = [part for t in trajectories if (part := t.reward_parts.get(function)) is not None]
        if parts:
            means[f"reward/{function}"] = Mean(math.fsum(parts), float(len(parts)))
    return means


def _seed(seed: int, prompt: Prompt, sampling: SamplingParams) -> int:
    """The prompt's own seed: siblings of different prompts must not share their random numbers."""
    if sampling.temperature == 0:
        return seed  # greedy draws nothing; equal parameters let an engine take all at once
    digest = hashlib.blake2b(f"{seed} {prompt.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch for the block, and give them back as they were."""
    python, array = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
