"""V_0: it knows which prompts are hard before they are sampled, and follows a policy that changes."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config

from llmac.core.calibration import ranking_auc
from llmac.core.protocols import Critic, Observer, PromptCritic
from llmac.core.segments import every_token
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.critics.bench import CriticBench, Shippable
from llmac.critics.in_context import interleaved, labels_of
from llmac.critics.prompt_record import PromptRecord
from llmac.critics.prompt_states import EmbeddingStates, TrunkStates, pooled, text_of
from llmac.critics.prompt_value import PromptValueConfig
from llmac.errors import CheckpointError, ConfigError
from llmac.models.policy import TokenPolicy
from llmac.runtime.checkpoint import Saveable
from llmac.runtime.context import Runtime
from tests.algorithms.making import card
from tests.e2e.conftest import character_tokenizer

from .test_value_head import rollouts_of

WIDTH = 8
WORDS = 64
"""Tokens of the toy prompts; each has a random direction."""


@pytest.fixture
def runtime():
    runtime = Runtime.create(seed=0, output=None)
    yield runtime
    runtime.close()


class Toy:
    """Prompts of four tokens, read by a trunk that averages word vectors; chances smooth in what is read."""

    def __init__(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.words = torch.randn(WORDS, WIDTH, generator=self.random)
        self.direction = 3 * torch.randn(WIDTH, generator=self.random)
        self.asked = 0

    def states(self, rows):
        """`HiddenStates`: a word vector for each token."""
        self.asked += len(rows.input_ids)
        return self.words[rows.input_ids].flatten(0, 1)

    def prompts(self, count, name="p"):
        ids = torch.randint(WORDS, (count, 4), generator=self.random).tolist()
        return [
            Prompt(id=f"{name}{i}", token_ids=tuple(row), source="?") for i, row in enumerate(ids)
        ]

    def chances(self, prompts, *, sign=1.0, shift=0.0):
        read = torch.stack([self.words[list(p.token_ids)].mean(0) for p in prompts])
        return torch.sigmoid(sign * read @ self.direction + shift)

    def rollouts(self, prompts, *, responses=4, reward=lambda won: won, **policy):
        wins = torch.rand(len(prompts), responses, generator=self.random)
        wins = (wins < self.chances(prompts, **policy)[:, None]).float()
        return rollouts_of(
            [
                Trajectory(
                    prompt=prompt,
                    response_ids=(1, 2),
                    action_mask=(True, True),
                    sampler_logprobs=(0.0, 0.0),
                    finish=Finish.STOP,
                    group=number,
                    reward=reward(float(won)),
                )
                for number, (prompt, row) in enumerate(zip(prompts, wins, strict=True))
                for won in row
            ]
        )


def bench_of(toy, runtime):
    policy = TokenPolicy(
        AutoModelForCausalLM.from_config(
            Qwen2Config(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=8,
            )
        ),
        temperature=1.0,
        chunk_mb=1.0,
    )

    @dataclasses.dataclass
    class Model:
        name: str = "none"
        dtype: str = "float32"
        revision: None = None
        trust_remote_code: bool = False
        attention: None = None

    return CriticBench(
        runtime=runtime,
        model=Model(),
        policy=policy,
        policy_states=toy.states,
        engine=None,
        score=None,
        pad_id=0,
        minibatches=1,
        max_tokens_per_microbatch=100,
        steps=40,
        compute_dtype=None,
        before_learning=lambda: None,
    )


def critic_of(toy, runtime, **settings):
    torch.manual_seed(0)
    return PromptValueConfig(**settings).build(bench_of(toy, runtime))


def auc(values, chances):
    """How well values rank prompts by their true chances."""
    weight, group = torch.ones(len(values)), torch.zeros(len(values), dtype=torch.long)
    return float(ranking_auc(values, chances, 1 - chances, group, weight))


def mean_squared(x):
    return float(x.square().mean())


def test_unseen_prompts_are_ranked_and_foreseen_better_than_by_the_mean(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime)
    for _ in range(4):
        metrics = critic.observe(toy.rollouts(toy.prompts(64)))
    unseen = toy.prompts(300, "unseen")
    values, chances = critic.prompt_values(unseen), toy.chances(unseen)
    # Even the true chances rank luck no better than this.
    best = auc(chances, chances)
    assert auc(values, (chances > chances.median()).float()) > 0.95
    assert auc(values, chances) > 0.97 * best
    assert mean_squared(values - chances) < 0.15 * mean_squared(chances - chances.mean())
    assert metrics["critic/prompt_auc"].value > 0.8
    assert metrics["critic/prompt_explained_var"].value > 0.4


@pytest.mark.slow
def test_a_policy_whose_rates_change_is_followed(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime, memory_steps=2.0, context=1024)
    aucs = []
    for step in range(16):
        policy = {"sign": 1.0} if step < 6 else {"sign": -1.0, "shift": 1.0}
        metrics = critic.observe(toy.rollouts(toy.prompts(64), **policy))
        aucs.append(metrics["critic/prompt_auc"].value)
    assert min(aucs[2:6]) > 0.8
    assert aucs[6] < 0.2  # what was hard became easy over night
    assert min(aucs[10:]) > 0.8
    unseen = toy.prompts(300, "unseen")
    chances = toy.chances(unseen, sign=-1.0, shift=1.0)
    assert abs(float(critic.prompt_values(unseen).mean() - chances.mean())) < 0.1


def test_before_any_outcome_the_middle_is_said_and_nothing_is_certain_later(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime, reward_range=(-1.0, 1.0))
    prompts = toy.prompts(4)
    assert critic.prompt_values(prompts).tolist() == [0.0] * 4
    assert toy.asked == 0
    critic.observe(toy.rollouts(prompts, shift=100.0, reward=lambda won: 2 * won - 1))
    # All four solved: chances stop at 5/6, values at 2 · 5/6 - 1.
    unseen = toy.prompts(3, "unseen")
    assert critic.prompt_values(unseen).tolist() == pytest.approx([4 / 6] * 3)


def test_all_states_of_a_response_have_the_value_of_its_prompt(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime)
    assert isinstance(critic, Critic)
    assert isinstance(critic, Observer)
    assert isinstance(critic, PromptCritic)
    assert isinstance(critic, Saveable)
    assert isinstance(critic, Shippable)
    critic.observe(toy.rollouts(toy.prompts(64)))
    prompts = toy.prompts(5, "next")
    said = critic.prompt_values(prompts)
    rollouts = toy.rollouts(prompts)
    starts = every_token(rollouts.action_mask)
    values = critic.values(rollouts, starts)
    torch.testing.assert_close(values.at, said.repeat_interleave(4)[:, None].expand(-1, 2))
    assert float(said.std()) > 0.01
    # As a baseline of PPO: reward minus the prompt's value, everywhere.
    ppo = card("ppo", whiten_advantages=False)
    credit = ppo.credit(rollouts, values)
    expected = rollouts.rewards.sum(1) - said.repeat_interleave(4)
    torch.testing.assert_close(credit.advantages, expected[:, None].expand(-1, 2))
    assert critic.update(rollouts, credit.critic_targets) == {}


def test_what_is_said_before_a_step_does_not_know_its_outcomes(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime)
    critic.observe(toy.rollouts(toy.prompts(64)))
    prompts = toy.prompts(5, "next")
    said, asked = critic.prompt_values(prompts), toy.asked
    lost, won = (toy.rollouts(prompts, shift=shift) for shift in (-100.0, 100.0))
    for rollouts in (lost, won):
        values = critic.values(rollouts, every_token(rollouts.action_mask))
        assert torch.equal(values.at[:, 0], said.repeat_interleave(4))
    assert toy.asked == asked  # and nothing is read twice
    critic.observe(won)
    assert bool((critic.prompt_values(prompts) > said).all())


def test_a_restored_critic_says_the_same(runtime, tmp_path):
    toy = Toy()
    for number, settings in enumerate([{}, {"learner": "transformer", "updates": 2}]):
        critic = critic_of(toy, runtime, **settings)
        for _ in range(2):
            critic.observe(toy.rollouts(toy.prompts(16)))
        folder = tmp_path / str(number)
        folder.mkdir()
        critic.save(folder)
        unseen = toy.prompts(6, "unseen")
        said = critic.prompt_values(unseen)
        again = critic_of(toy, runtime, **settings)
        again.load(folder)
        assert torch.equal(again.prompt_values(unseen), said)
        following = toy.rollouts(toy.prompts(16))
        torch.manual_seed(1)  # dropout; a run saves its random numbers with everything else
        expected = critic.observe(following)
        torch.manual_seed(1)
        assert again.observe(following) == expected
        assert torch.equal(again.prompt_values(unseen), critic.prompt_values(unseen))
        # Shipped to another run, which knows what this one knew.
        critic.save_pretrained(folder / "shipped", policy=folder)
        other = critic_of(toy, runtime, init=str(folder / "shipped"), **settings)
        assert torch.equal(other.prompt_values(unseen), critic.prompt_values(unseen))


def test_a_folder_without_a_record_is_named(runtime, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no prompt_record\.safetensors"):
        critic_of(Toy(), runtime, init=str(tmp_path))


def test_the_record_keeps_the_latest_on_every_kind_of_prompt(tmp_path):
    messages = [{"role": "user", "content": "1+1?"}]
    record = PromptRecord(3)
    chat = Prompt(id="chat", token_ids=(1, 2), source=messages)
    for step in range(2):
        plain = Prompt(id=f"p{step}", token_ids=(3,), source="?")
        record.add([(chat, 0.25, 4), (plain, 0.5, 2)])
    assert [(entry.prompt.id, entry.step) for entry in record] == [
        ("p0", 1),
        ("chat", 2),
        ("p1", 2),
    ]
    record.save(tmp_path)
    again = PromptRecord(2)
    again.load(tmp_path)
    assert list(again) == record.latest(2)
    assert again.step == 2
    assert text_of(record.latest(2)[0].prompt) == "1+1?"
    empty = PromptRecord(2)
    empty.save(tmp_path)
    again.load(tmp_path)
    assert len(again) == again.step == 0


@pytest.mark.slow
def test_the_transformer_learns_to_read_its_context(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime, learner="transformer", updates=8, lr=2e-3, context=64)
    for _ in range(20):
        metrics = critic.observe(toy.rollouts(toy.prompts(32)))
    assert metrics["critic/prompt_loss"].value < 0.6
    unseen = toy.prompts(300, "unseen")
    values, chances = critic.prompt_values(unseen), toy.chances(unseen)
    assert auc(values, (chances > chances.median()).float()) > 0.8
    assert mean_squared(values - chances) < 0.7 * mean_squared(chances - chances.mean())


def test_training_leaves_out_steps_without_good_and_bad_prompts(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime, learner="transformer")
    assert "critic/prompt_loss" not in critic.observe(toy.rollouts(toy.prompts(8), shift=100.0))
    assert "critic/prompt_loss" in critic.observe(toy.rollouts(toy.prompts(8)))


def test_good_and_bad_prompts_take_turns():
    record = PromptRecord(9)
    record.add((p, float(i < 2), 1) for i, p in enumerate(Toy().prompts(6)))
    entries = list(record)
    drawn = interleaved(entries, 8, torch.Generator().manual_seed(0))
    assert labels_of(drawn, "soft").tolist() == [1.0, 0.0] * 4
    assert len({entry.prompt.id for entry in drawn}) == 6  # both good ones twice, four bad ones


def test_hard_labels_forget_how_often(runtime):
    record = PromptRecord(4)
    record.add((p, solved, 4) for p, solved in zip(Toy().prompts(3), [0.4, 0.5, 1.0], strict=True))
    assert labels_of(list(record), "hard").tolist() == [0.0, 1.0, 1.0]


def test_prompts_are_read_in_their_order_whatever_the_parts(runtime):
    toy = Toy()
    prompts = [
        dataclasses.replace(p, token_ids=p.token_ids[: 1 + i % 4])
        for i, p in enumerate(toy.prompts(9))
    ]
    for tokens in (1, 7, 1000):
        states = TrunkStates(toy.states, runtime, pad_id=0, max_tokens=tokens)
        read = pooled(states(prompts), "mean")
        expected = torch.stack([toy.words[list(p.token_ids)].mean(0) for p in prompts])
        torch.testing.assert_close(read, expected)
        last = pooled(states(prompts), "last")
        torch.testing.assert_close(last, torch.stack([toy.words[p.token_ids[-1]] for p in prompts]))


def test_a_model_of_its_own_reads_the_text_as_its_tokenizer_cuts_it(runtime, tmp_path):
    config = Qwen2Config(
        vocab_size=9,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = ["ab=", "c=", "abcdef", "d", "fa="]
    prompts = [Prompt(id=text, token_ids=(8, 8, 8, 8), source=text) for text in texts]
    toy = Toy()
    critic = critic_of(toy, runtime, embedding=str(tmp_path))
    for tokens in (6, 1000):
        states = EmbeddingStates(
            str(tmp_path), bench_of(toy, runtime).model, runtime, max_tokens=tokens
        )
        for text, found in zip(texts, pooled(states(prompts), "mean"), strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                expected = model(input_ids=ids).last_hidden_state[0].mean(0)
            torch.testing.assert_close(found, expected)
    # The token ids are the policy's and do not count.
    critic.observe(toy.rollouts(prompts))
    critic.prompt_values(prompts)
    assert toy.asked == 0
    with pytest.raises(ConfigError, match=r"critic\.embedding: no tokenizer"):
        critic_of(toy, runtime, embedding=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_range": (1.0, 0.0)}, r"reward_range must be \(failure, success\)"),
        ({"reward_range": (-math.inf, 0.0)}, r"reward_range must be \(failure, success\)"),
        ({"memory_steps": math.inf}, "memory_steps must be finite"),
        ({"context": 0}, "context must be at least 1"),
        ({"memory_steps": 0.0}, "memory_steps must be above 0"),
        ({"pair_weight": 1.5}, r"pair_weight must be in \[0, 1\]"),
        ({"queries": 1}, "queries must be at least 2"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"learner": "transformer", "history": 100}, "history holds the context too"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptValueConfig(**settings)


def test_settings_of_the_other_learner_have_no_effect():
    kernel = PromptValueConfig().without_effect()
    transformer = PromptValueConfig(learner="transformer").without_effect()
    assert {"lr", "updates", "history", "betas"} <= set(kernel)
    assert set(transformer) == {"pooling", "memory_steps"}
    assert not set(kernel) & set(transformer)
    fields = {field.name for field in dataclasses.fields(PromptValueConfig)}
    assert set(kernel) | set(transformer) <= fields


def test_outcomes_beyond_the_range_are_counted(runtime):
    toy = Toy()
    critic = critic_of(toy, runtime)
    first, second, third = toy.prompts(3)
    rollouts = rollouts_of(
        toy.rollouts([first], reward=lambda won: -3.0).trajectories
        + toy.rollouts([second], reward=lambda won: 0.5).trajectories[:2]
        + toy.rollouts([third], reward=lambda won: 7.0).trajectories[:2]
    )
    assert critic.observe(rollouts)["critic/vf_target_clipfrac"].value == 0.75


def paused(rollouts):
    return rollouts_of(
        [dataclasses.replace(t, finish=Finish.PAUSED, reward=None) for t in rollouts.trajectories]
    )


def test_what_was_said_before_a_checkpoint_is_said_after_it(runtime, tmp_path):
    toy = Toy()
    critic = critic_of(toy, runtime)
    critic.observe(toy.rollouts(toy.prompts(16)))
    prompts = toy.prompts(5, "open")
    said = critic.prompt_values(prompts)
    assert critic.observe(paused(toy.rollouts(prompts))) == {}
    critic.save(tmp_path)
    toy.words += torch.randn(WORDS, WIDTH, generator=toy.random)  # the policy goes on
    again = critic_of(toy, runtime)
    again.load(tmp_path)
    assert torch.equal(again.prompt_values(prompts), said)
    assert torch.equal(critic.prompt_values(prompts), said)
    (tmp_path / "prompt_said.json").unlink()  # as checkpoints were before
    again.load(tmp_path)
    assert not torch.equal(again.prompt_values(prompts), said)


class Rank:
    """One of two ranks; the other always has something new to ask."""

    device = torch.device("cpu")
    world_size = 2

    def __init__(self, rank, others):
        self.rank, self.is_main, self.others = rank, rank == 0, others

    def max(self, number):
        return max(number, 1.0)

    def gather(self, item):
        return [item, *self.others]

    def passes(self, count):
        return count


def test_each_rank_goes_on_with_what_it_said_and_another_number_with_all(runtime, tmp_path):
    toy = Toy()
    mine, others = toy.prompts(1, "mine")[0], toy.prompts(1, "others")[0]
    rank = Rank(0, [[[["others0", others.token_ids], 0.25]]])
    critic = critic_of(toy, rank)
    critic._said = {(mine.id, mine.token_ids): 0.75}
    critic.save(tmp_path)
    found = {}
    for name, runs in (("first", rank), ("second", Rank(1, [])), ("alone", runtime)):
        again = critic_of(toy, runs)
        again.load(tmp_path)
        found[name] = again._said
    told = {("mine0", mine.token_ids): 0.75}, {("others0", others.token_ids): 0.25}
    assert found == {"first": told[0], "second": told[1], "alone": told[0] | told[1]}


def test_a_rank_with_nothing_new_still_says_what_it_said(runtime):
    toy = Toy()
    critic = critic_of(toy, Rank(0, []))
    critic._record.add((prompt, 0.5 + 0.1 * (i % 2), 4) for i, prompt in enumerate(toy.prompts(8)))
    prompts = toy.prompts(3, "next")
    said = critic.prompt_values(prompts)
    toy.words += torch.randn(WORDS, WIDTH, generator=toy.random)
    assert torch.equal(critic.prompt_values(prompts), said)
    assert toy.asked == 8 + 3 + 8 + 1  # the first is read again, for the other rank's sake
