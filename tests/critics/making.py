"""A tiny trunk, hand-made responses whose first token decides, and live critics on them."""

import dataclasses

import torch
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from llmac.core.collate import collate
from llmac.core.segments import every_token
from llmac.core.types import CriticTargets, Finish, Prompt, Rollouts, Trajectory
from llmac.critics.bench import CriticBench
from llmac.models.policy import TokenPolicy
from llmac.models.value_model import ValueModel

CONFIG = Qwen2Config(
    vocab_size=11,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    initializer_range=0.2,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a critic reads of the recipe's model section."""

    name: str = "none"
    dtype: str = "float32"
    attention: None = None
    revision: None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    lora: None = None


def trajectory(response, reward, finish=Finish.STOP):
    return Trajectory(
        prompt=Prompt(id="p", token_ids=(1, 2), source="?"),
        response_ids=tuple(response),
        action_mask=(True,) * len(response),
        sampler_logprobs=(0.0,) * len(response),
        finish=finish,
        group=0,
        reward=reward,
    )


def rollouts_of(trajectories):
    batch = collate(trajectories, length_limit=8)
    names = ("response_ids", "action_mask", "rewards", "truncated", "group", "sampler_logprobs")
    return Rollouts(
        **{name: getattr(batch, name) for name in names},
        old_logprobs=batch.sampler_logprobs,
        ref_logprobs=None,
        length_limit=8,
        trajectories=batch.trajectories,
    )


def rows(low=0.0, high=1.0):
    """The outcome is written in the first token: 3 wins, 4 loses; two of five win."""
    return [
        trajectory([3, 5, 6], high),
        trajectory([4, 5], low),
        trajectory([3, 7, 7, 7], high),
        trajectory([4], low),
        trajectory([4, 8, 9], low),
    ]


def bench(runtime, policy=None, **changes):
    """What `build` gives to a critic; the policy is made when it is not given."""
    if policy is None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG)
        policy = TokenPolicy(model, temperature=1.0, chunk_mb=1.0)

    @torch.no_grad()
    def states(rows):
        return policy(rows, hidden_only=True)[0]

    settings = {
        "runtime": runtime,
        "model": Model(),
        "policy": policy,
        "policy_states": states,
        "engine": None,
        "score": None,
        "pad_id": 0,
        "minibatches": 1,
        "max_tokens_per_microbatch": 1000,
        "steps": 100,
        "compute_dtype": None,
        "before_learning": lambda: None,
    }
    return CriticBench(**settings | changes)


def live(config, runtime, *, fresh=True, dtype=torch.float32, **changes):
    """The critic of some settings on a trunk that is always the same."""
    torch.manual_seed(0)
    model = ValueModel(AutoModel.from_config(CONFIG).to(dtype), config.spec(CONFIG.hidden_size))
    return config.around(model, bench(runtime, **changes), fresh_head=fresh)


def asked(critic, rollouts):
    """V at every token."""
    return critic.values(rollouts, every_token(rollouts.action_mask))


def taught(critic, rollouts, times):
    """The critic after some steps towards the outcomes, and the last step's metrics."""
    mask = rollouts.action_mask
    returns = rollouts.rewards.sum(1, keepdim=True).expand_as(rollouts.rewards) * mask
    metrics = {}
    for _ in range(times):
        old = asked(critic, rollouts).at
        targets = CriticTargets(returns=returns, value_mask=mask, old_values=old)
        metrics = critic.update(rollouts, targets)
    return metrics
