"""Historic bugs that need the living parts of a run: model, engine, rewards, checkpoints. One test each."""

import contextlib
import dataclasses
import json
import math
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmac.api import run as train
from llmac.build import build
from llmac.config import load_recipe
from llmac.core.collate import collate
from llmac.errors import CheckpointError, ConsistencyError, EngineError, RewardError
from llmac.export import check_not_empty, save_policy
from llmac.loop import prove_sync, synchronize
from llmac.loop import train as run_loop
from llmac.models.value_model import ValueModel
from llmac.runtime.context import Runtime

CONFIG = Qwen2Config(
    vocab_size=9,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    initializer_range=0.1,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random model of 9 characters."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Qwen2ForCausalLM(CONFIG).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdef="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def count_a(prompt, response):
    return response.count("a") / max(len(response), 1)


@pytest.fixture
def recipe(model, tmp_path):
    """Makes a small recipe; keyword arguments change its sections. Four steps are two epochs."""
    rows = tmp_path / "rows.jsonl"
    letters = string.ascii_lowercase[:6]
    prompts = [f"{a}{b}=" for a, b in zip(letters, letters[1:] + "a", strict=True)] + ["aa=", "bb="]
    rows.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))

    def make(reward=count_a, **sections):
        settings = {
            "model": {"name": str(model)},
            "data": {"name": str(rows)},
            "reward": reward,
            "algorithm": {"name": "grpo", "group_size": 4},
            "actor": {"lr": 3e-3, "prompts_per_step": 4},
            "rollout": {"max_new_tokens": 8},
            "run": {"steps": 4, "output": str(tmp_path / "run")},
        }
        for name, section in sections.items():
            settings[name] = {**settings.get(name, {}), **section}
        return load_recipe(settings)

    return make


@pytest.fixture
def alive():
    """Builds the parts of a recipe and takes them apart afterwards."""
    with contextlib.ExitStack() as cleanup:

        def make(recipe):
            runtime = Runtime.create(seed=0, output=Path(recipe.run.output))
            parts = build(recipe, runtime)
            for part in (runtime, parts.engines, parts.log, parts.score, parts.phases):
                cleanup.callback(part.close)
            return parts

        yield make


def metrics_of(recipe):
    file = Path(recipe.run.output) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def weights_of(recipe):
    return load_file(Path(recipe.run.output) / "final/model.safetensors")


class Forgetful:
    """An engine that keeps its first weights of some names, whatever it is given later."""

    def __init__(self, engine, first_weights, *, keeps, from_version=0, says_so=False):
        self._engine = engine
        self._kept = {n: t.detach().clone() for n, t in first_weights if keeps in n}
        self._from_version, self._says_so = from_version, says_so

    @property
    def policy_version(self):
        return 0 if self._says_so else self._engine.policy_version

    def generate(self, requests):
        return self._engine.generate(requests)

    def load_weights(self, weights, version):
        forgets = version >= self._from_version
        kept = self._kept if forgets else {}
        self._engine.load_weights(((n, kept.get(n, tensor)) for n, tensor in weights), version)

    def sleep(self):
        self._engine.sleep()

    def wake(self):
        self._engine.wake()

    def close(self):
        self._engine.close()


def with_forgetful_engine(parts, **options):
    return dataclasses.replace(
        parts, engine=Forgetful(parts.engine, parts.actor.weights(), **options)
    )


def test_resuming_at_an_epoch_boundary_trains_on(recipe, alive):
    """Lesson (verl 5725): the data loader was at its end, and the resumed run trained zero steps."""
    first, longer = recipe(run={"steps": 2}), recipe()
    train(first)
    before = weights_of(first)
    train(longer)
    assert [line["step"] for line in metrics_of(longer)] == [1, 2, 3, 4]
    assert all(line["actor/grad_norm"] > 0 for line in metrics_of(longer))
    assert any(not torch.equal(before[name], t) for name, t in weights_of(longer).items())
    parts = alive(longer)
    assert parts.checkpoints.restore_latest(parts.roles) == 4
    assert parts.prompts.epoch == 2.0


def test_a_resumed_run_is_given_the_prompts_it_had_not_seen(recipe, alive):
    """Lesson (OpenRLHF 1103): without the sampler's state the first prompts come again."""
    whole = alive(recipe()).prompts.take(8)
    half = recipe(run={"steps": 1})
    train(half)
    parts = alive(recipe(run={"steps": 2}))
    parts.checkpoints.restore_latest(parts.roles)
    assert [p.id for p in parts.prompts.take(4)] == [p.id for p in whole[4:]]


def test_at_another_temperature_sampler_and_trainer_agree(recipe, alive):
    """Lesson (TRL 4159): the sampler divided its logits by the temperature, the trainer did not."""
    cool = recipe(rollout={"temperature": 0.7}, run={"steps": 2})
    parts = alive(cool)
    synchronize(parts, version=0, probe=True)
    sampled, _ = parts.plan.rollout(
        parts.engine, parts.prompts, parts.score, seed=1, sum_across=parts.runtime.sum
    )
    undivided = [
        abs(said - other)
        for t in sampled
        for said, other in zip(
            t.sampler_logprobs,
            parts.actor.logprobs_of(t.prompt.token_ids, t.response_ids),
            strict=True,
        )
    ]
    assert sum(undivided) / len(undivided) > 0.02

    train(cool)
    for line in metrics_of(cool):
        assert line["actor/sampler_logprob_diff_max"] < 1e-4
        assert line["actor/ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_a_policy_that_is_not_what_it_was_stops_the_run(recipe, alive):
    """Lesson (TRL 4772): ratios exploded for reasons no metric named; the first ratio must be 1."""
    parts = alive(recipe())
    synchronize(parts, version=0, probe=False)
    sampled, _ = parts.plan.rollout(
        parts.engine, parts.prompts, parts.score, seed=1, sum_across=parts.runtime.sum
    )
    seen = parts.actor.annotate(collate(sampled, length_limit=8), reference=False)
    moved = dataclasses.replace(seen, old_logprobs=seen.old_logprobs - 0.1 * seen.action_mask)
    credit = parts.algorithm.credit(moved, None)
    with pytest.raises(ConsistencyError, match=r"log-probabilities changed by 0\.1 on average"):
        parts.actor.update(moved, credit, parts.algorithm)


@pytest.mark.parametrize("written", ["nothing", "no tensors", "tensors without elements"])
def test_a_model_saved_without_weights_is_noticed(written, tmp_path):
    """Lesson (TRL 4416): adapters of sharded models were saved as shapes of zero for weeks."""
    if written != "nothing":
        empty = {"lora_A": torch.empty(0)} if "without" in written else {}
        save_file(empty, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="saved without weights"):
        check_not_empty(tmp_path)
    save_policy(Qwen2ForCausalLM(CONFIG), tmp_path, is_main=True)
    check_not_empty(tmp_path)
    assert load_file(tmp_path / "model.safetensors")


def test_one_nan_among_the_rewards_stops_the_run_and_names_the_prompt(recipe):
    """Lesson (TRL 5775): one NaN made every advantage of its group NaN, and then every weight."""
    rewards = torch.tensor([1.0, 0.0, math.nan, 1.0])
    assert (rewards - rewards.mean()).isnan().all()

    def judge(prompts, completions, **kwargs):
        return [math.nan if p == "cd=" else 1.0 for p in prompts]

    poisoned = recipe(judge)
    with pytest.raises(RewardError, match="judge returned nan for prompt rows/train/2"):
        train(poisoned)
    assert metrics_of(poisoned) == []
    assert not (Path(poisoned.run.output) / "final").exists()


def test_an_error_in_a_reward_is_counted_and_does_not_enter_its_mean(recipe):
    """Lesson (verl 5635): a verifier failed in threads, and every reward was silently 0."""

    def judge(prompt, response):
        if prompt == "ab=":
            raise TimeoutError("signal only works in main thread")
        return 1.0

    train(recipe({"functions": [judge], "on_error": "skip"}))
    lines = metrics_of(recipe())
    assert sum(line["reward/judge/errors"] for line in lines) == 8  # 2 epochs x 4 siblings
    assert all(line["reward/judge/mean"] == 1.0 for line in lines)


def test_a_reward_that_is_always_zero_is_reported_by_name(recipe, caplog):
    """Lesson (verl 5635): nobody looks at a mean of 0 for a day of training."""

    def judge(prompt, response):
        return 0.0

    train(recipe({"functions": [judge], "zero_warning_steps": 3}))
    said = [r.message for r in caplog.records if "said 0 to every response" in r.message]
    assert len(said) == 1
    assert "reward function judge has said 0 to every response for 3 steps" in said[0]
    # All-equal rewards teach nothing: not a weight may move.
    assert all(line["actor/grad_norm"] == 0.0 for line in metrics_of(recipe()))


def test_the_critic_is_in_every_checkpoint_and_beside_the_policy(recipe):
    """Lesson (TRL 3308, OpenRLHF 65): the trained critic was thrown away at the end."""
    settings = recipe(algorithm={"name": "ppo", "group_size": 2}, critic={"lr": 1e-2})
    result = train(settings)
    checkpoint = Path(settings.run.output) / "checkpoints/step-00000004"
    assert "critic" in json.loads((checkpoint / "manifest.json").read_text())["roles"]
    trained = torch.load(checkpoint / "critic/learner.pt", weights_only=True)["module"]
    saved = ValueModel.from_pretrained(result.model / "critic")
    assert any(torch.equal(saved.head.weight, tensor) for tensor in trained.values())
    assert saved.head.weight.abs().sum() > 0


def test_critic_warm_up_does_not_use_up_the_policys_schedule(recipe):
    """Lesson (RLinf 1359): the policy's learning rate had decayed before its first step."""
    ppo = {"name": "ppo", "group_size": 2}
    actor = {"schedule": "linear", "warmup_steps": 1}
    late = recipe(algorithm=ppo, actor=actor, run={"steps": 5, "critic_warmup_steps": 2})
    train(late)
    lines = metrics_of(late)
    assert all("actor/lr" not in line and "actor/pg_loss" not in line for line in lines[:2])
    assert all(line["critic/lr"] > 0 for line in lines)
    # 1 of 1 steps of warm-up, then down a line of 2 steps that reaches 0 after the last one.
    assert [line["actor/lr"] for line in lines[2:]] == pytest.approx([3e-3, 3e-3, 1.5e-3])


def test_an_untrained_critic_is_not_worse_than_the_mean(recipe):
    """Lesson (verl 498, NeMo-RL 3412): values of -16 to 13 on 0/1 rewards, explained variance -72."""

    def far_from_zero(prompt, response):
        return -14.0 + count_a(prompt, response)

    settings = recipe(
        far_from_zero,
        algorithm={"name": "ppo", "group_size": 2, "lam": 1.0},
        critic={"reward_range": [-14.0, -13.0]},
    )
    train(settings)
    first = metrics_of(settings)[0]
    assert first["critic/vf_explained_var"] >= -1e-5
    assert first["critic/values/mean"] == pytest.approx(first["reward/mean"], abs=1e-4)


def test_an_engine_that_does_not_take_the_version_is_noticed(recipe, alive):
    """Lesson (TRL 5312): with sleep mode on, the sampler was never updated."""
    parts = with_forgetful_engine(alive(recipe()), keeps="", says_so=True)
    with pytest.raises(ConsistencyError, match="version 0 after it was given version 3"):
        synchronize(parts, version=3, probe=False)


@pytest.mark.parametrize("keeps", ["", "embed_tokens", "layers.1.mlp.up_proj", "model.norm"])
def test_an_engine_that_keeps_old_weights_is_noticed_before_the_first_step(keeps, recipe, alive):
    """Lesson (vLLM 29341, TRL 5312): the version is right, the text is fluent, the weights are old."""
    forgetful = with_forgetful_engine(alive(recipe()), keeps=keeps)
    synchronize(forgetful, version=0, probe=True)  # nothing to see while nothing was learned
    with pytest.raises(EngineError, match="every weight changed"):
        prove_sync(forgetful)
    with pytest.raises(EngineError, match="start-up probe"):
        run_loop(recipe().run, forgetful)
    assert metrics_of(recipe()) == []


def test_the_start_up_proof_leaves_the_true_weights(recipe, alive):
    parts = alive(recipe())
    prove_sync(parts)
    synchronize(parts, version=0, probe=True)
    assert parts.engine.policy_version == 0


def test_with_adapters_too_the_start_shows_an_engine_that_keeps_old_weights(recipe, alive):
    """Lesson (TRL 5312): adapters change nothing at first, so for the proof every weight of the trainer is changed."""
    settings = recipe(model={"lora": {"r": 4, "alpha": 8}}, run={"steps": 8})
    parts = with_forgetful_engine(alive(settings), keeps="")
    with pytest.raises(EngineError, match="start-up probe, every weight changed"):
        run_loop(settings.run, parts)


def test_an_engine_that_stops_taking_weights_later_is_noticed_by_the_probe(recipe, alive):
    """Lesson (NeMo-RL 2631): the first sync was right, the ones after a sleep were not."""
    settings = recipe(actor={"lr": 3e-2}, rollout={"probe_every": 2}, run={"steps": 8})
    parts = with_forgetful_engine(alive(settings), keeps="", from_version=2)
    with pytest.raises(EngineError, match="after the sync of version 2"):
        run_loop(settings.run, parts)
    assert [line["step"] for line in metrics_of(settings)] == [1]


def test_the_probes_find_room_in_a_full_context(recipe, tmp_path):
    """Prompts that leave the model 8 tokens are trained on; the probe's own 16 tokens fit as well."""
    full = tmp_path / "full.jsonl"
    full.write_text("\n".join(json.dumps({"prompt": "ab" * 12}) for _ in range(4)))
    settings = recipe(data={"name": str(full)}, rollout={"probe_every": 1}, run={"steps": 2})
    train(settings)
    assert len(metrics_of(settings)) == 2
