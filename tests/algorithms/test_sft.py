"""Supervised fine-tuning: the loss of a library that masks the prompt, and nothing besides."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmac.core.collate import collate
from llmac.core.demonstrations import Demonstrations
from llmac.core.protocols import SamplingParams
from llmac.core.stored import Stored
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.models.packing import Packing
from llmac.models.policy import TokenPolicy

from .making import card, entropy_of, make_values, moved

ROWS = [((3, 4, 5), (6, 7, 1)), ((2,), (8, 1)), ((9, 9), (4, 4, 4, 4, 1))]


def rollouts_of(rows):
    trajectories = [
        Trajectory(
            prompt=Prompt(id=f"p{i}", token_ids=prompt, source="?"),
            response_ids=response,
            action_mask=(True,) * len(response),
            sampler_logprobs=(0.0,) * len(response),
            finish=Finish.STOP,
            group=i,
            reward=0.0,
        )
        for i, (prompt, response) in enumerate(rows)
    ]
    batch = collate(trajectories, length_limit=8)
    return Rollouts.of(batch, old_logprobs=torch.zeros(batch.response_ids.shape))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).double()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_loss_and_gradient_are_those_of_labels_that_mask_the_prompt(model):
    width = max(len(p) + len(r) for p, r in ROWS)
    ids = torch.tensor([[*p, *r] + [0] * (width - len(p + r)) for p, r in ROWS])
    labels = torch.tensor([[-100] * len(p) + [*r] + [-100] * (width - len(p + r)) for p, r in ROWS])
    expected = model(input_ids=ids, attention_mask=(labels != -100) | (ids > 0), labels=labels).loss
    expected.backward()
    theirs = gradients(model)

    rollouts, algorithm = rollouts_of(ROWS), card("sft")
    policy = TokenPolicy(model, temperature=1.0, chunk_mb=1.0)
    packed = Packing(kind="padded", max_tokens=64, pad_id=0).pack(rollouts.trajectories)
    logprobs, entropy = policy(packed, entropy_gradient=False)
    credit = algorithm.credit(rollouts, None)
    loss = algorithm.policy_loss(logprobs, rollouts, credit, entropy=entropy)
    (loss.total / loss.weight).backward()
    ours = gradients(model)
    assert (loss.total / loss.weight).item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.metrics["actor/pg_loss"].value == pytest.approx(expected.item(), abs=1e-12)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-12) for n in theirs)


def test_every_token_of_a_completion_weighs_one_and_no_advantage_is_given(rollouts):
    credit = card("sft").credit(rollouts, None)
    assert torch.equal(credit.likelihood, rollouts.action_mask.double())
    assert torch.equal(credit.policy_mask, rollouts.action_mask)
    assert (credit.advantages == 0).all()
    assert credit.critic_targets is None
    assert credit.metrics == {}


def test_how_far_the_policy_has_moved_does_not_matter(rollouts):
    algorithm = card("sft")
    logprobs = moved(rollouts, spread=2.0)
    loss = algorithm.policy_loss(logprobs, rollouts, algorithm.credit(rollouts, None))
    (gradient,) = torch.autograd.grad(loss.total, logprobs)
    assert torch.equal(gradient, -rollouts.action_mask.double())


def test_means_of_rows_are_there_for_those_who_want_them(rollouts):
    algorithm = card("sft", aggregation="sequence_mean_token_mean")
    logprobs = moved(rollouts)
    loss = algorithm.policy_loss(logprobs, rollouts, algorithm.credit(rollouts, None))
    mask = rollouts.action_mask
    some = mask.any(1)
    means = (-logprobs * mask).sum(1)[some] / mask.sum(1)[some]
    assert (loss.total / loss.weight).item() == pytest.approx(means.mean().item())


def test_entropy_and_kl_stand_beside_the_likelihood(rollouts):
    logprobs = moved(rollouts)
    totals = []
    for fields in ({}, {"entropy_coef": 0.1}, {"kl_coef": 0.1}):
        algorithm = card("sft", **fields)
        credit = algorithm.credit(rollouts, None)
        loss = algorithm.policy_loss(logprobs, rollouts, credit, entropy=entropy_of(logprobs))
        totals.append(loss.total.item())
    assert totals[1] < totals[0] < totals[2]


def test_stored_responses_are_watched_for_the_distance_to_their_sampler(rollouts):
    algorithm = card("sft", rollouts="stored.parquet", mask_truncated=True)
    credit = algorithm.credit(rollouts, None)
    assert {"actor/sampler_kl", "actor/sampler_ratio_mean"} <= set(credit.metrics)
    assert not credit.policy_mask[rollouts.truncated].any()
    assert not credit.likelihood[rollouts.truncated].any()


def test_the_plan_is_of_the_data_or_of_the_file():
    sampling = SamplingParams(max_new_tokens=9)
    shown = card("sft", completion_column="answer", append_end=False).plan(
        prompts_per_step=4, sampling=sampling
    )
    assert shown == Demonstrations(
        column="answer", append_end=False, prompts_per_step=4, length_limit=9
    )
    kept = card("sft", rollouts="s.parquet", keep_above=0.5).plan(
        prompts_per_step=4, sampling=sampling
    )
    assert isinstance(kept, Stored)
    assert (kept.path, kept.keep_above, kept.length_limit) == ("s.parquet", 0.5, 9)


def test_values_are_refused(rollouts):
    with pytest.raises(
        ValueError, match="SFT learns from completions and has no use for a critic's"
    ):
        card("sft").credit(rollouts, make_values(rollouts))
