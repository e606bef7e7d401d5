"""A critic that writes and a partner: what they cost, where it shows, and the way out."""

from dataclasses import dataclass

import pytest

from llmac.algorithms.grpo import GRPO
from llmac.config import load_recipe
from llmac.errors import ConfigError
from llmac.placement.plan import GIB, Machines, plan
from llmac.placement.sampling import GRAPHS
from llmac.placement.second_engines import INSTRUCTIONS
from llmac.placement.sharding import Sharding, held
from llmac.placement.skeletons import bare_skeleton
from llmac.placement.ways_out import ways_out

from .making import RECIPE, folder_of

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
PROMPT = 100


@dataclass
class Talking:
    """A plan that speaks to the policy and to a partner."""

    partner_model: str
    partner: object = None
    player: object = None


@dataclass(frozen=True, kw_only=True)
class Talks(GRPO):
    """A card with such a plan."""

    partner_model: str = ""

    def plan(self, *, prompts_per_step, sampling):
        return Talking(self.partner_model)


@pytest.fixture
def large(tmp_path):
    return folder_of(tmp_path / "large", **LARGE)


@pytest.fixture
def smaller(tmp_path):
    return folder_of(tmp_path / "smaller", **LARGE | {"num_hidden_layers": 4})


@pytest.fixture
def planned(large):
    """Plan of PPO with a critic that writes: `planned("critic.engine=shared", engine="vllm")`."""

    def of(*overrides, engine="hf", algorithm="ppo", critic=True, **machines):
        settings = {**RECIPE, "model": {"name": large}, "algorithm": algorithm}
        settings["rollout"] = {"engine": engine, "max_new_tokens": 200}
        if critic:
            settings["critic"] = {"name": "generative", "max_new_tokens": 300}
        recipe = load_recipe(settings, overrides)
        return plan(
            recipe, Machines(**{"gpus": 1, "gpu_gib": 80.0} | machines), prompt_tokens=PROMPT
        )

    return of


def items(found, name):
    [phase] = [phase for phase in found.phases if phase.name == name]
    return phase.items


def test_a_critic_that_writes_is_trained_like_a_policy(planned, large):
    found = planned(gpus=2, sharding=Sharding.ZERO3)
    assert found.critic.elements == found.critic.trainable == found.policy.elements
    whole = held(found.critic, Sharding.ZERO3, 2)
    learning = items(found, "learn critic")
    assert learning["critic parameters"] == whole.parameters
    assert learning["critic optimizer"] == whole.optimizer
    assert learning["critic gradients"] == whole.gradients
    assert learning["logits"] > 0  # a head of values has none
    frozen = planned("critic.learns=false")
    assert frozen.critic is None
    assert "learn critic" not in [phase.name for phase in frozen.phases]
    assert items(frozen, "values")["critic's engine"] > bare_skeleton_bytes(large)


def bare_skeleton_bytes(folder):
    return bare_skeleton(
        load_recipe({**RECIPE, "model": {"name": folder}, "algorithm": "grpo"}).model
    ).bytes


def test_phases_of_a_critic_that_writes(planned):
    names = ["start", "generate", "values", "learn policy", "learn critic", "sync"]
    for engine in ("hf", "vllm"):
        assert [phase.name for phase in planned(engine=engine).phases] == names


def test_its_rows_have_instructions_problem_response_and_what_it_writes(planned):
    row = INSTRUCTIONS + PROMPT + 200 + 300
    assert planned().seconds[0].row == row
    shown = planned("critic.conditioning=attempts", "critic.attempts=2", "critic.attempt_tokens=50")
    assert shown.seconds[0].row == row + 2 * (PROMPT + 50)
    assert planned("critic.max_prompt_tokens=400").seconds[0].row == 400 + 300
    # A row longer than the budget is a micro-batch; a larger budget needs more.
    small, large_ = (
        items(planned(f"critic.max_tokens_per_microbatch={n}"), "learn critic")["activations"]
        for n in (row - 1, 2 * row)
    )
    assert large_ == 2 * small
    assert items(planned(), "learn critic")["activations"] == small  # the actor's 256 are fewer


def test_an_own_engine_of_transformers_keeps_its_weights_and_is_given_new_ones(planned, large):
    weights = bare_skeleton_bytes(large)
    found = planned("actor.max_tokens_per_microbatch=9999")
    for phase in ("start", "generate", "learn policy", "learn critic", "sync"):
        assert items(found, phase)["critic's engine"] == weights
    second = found.seconds[0]
    assert items(found, "values")["critic's engine"] == max(second.at_work, 2 * weights)
    assert items(found, "values")["sleeping sampler"] == weights
    tiny = planned(
        "rollout.max_num_seqs=1", "critic.max_prompt_tokens=1", "critic.max_new_tokens=1"
    )
    assert items(tiny, "values")["critic's engine"] == 2 * weights
    assert items(tiny, "values")["sync bucket"] > 0


def test_a_second_vllm_engine_takes_its_share_of_the_gpu_and_never_sleeps(planned):
    found = planned(engine="vllm")
    for phase in found.phases:
        assert phase.items["critic's engine"] == pytest.approx(0.3 * 80 * GIB, abs=4)
    assert items(found, "values")["sleeping sampler"] == GRAPHS
    assert found.seconds[0].sampler.longest == 8192
    limited = planned("critic.max_prompt_tokens=400", engine="vllm")
    assert limited.seconds[0].sampler.longest == 400 + 300
    for phase in found.phases:  # vLLM's budget is not fragmented by the trainer
        ours = sum(
            size
            for item, size in phase.items.items()
            if item not in ("critic's engine", "sampler weights", "KV cache", "sampler workspace")
            and item not in ("sleeping sampler", "CUDA and NCCL", "fragmentation")
        )
        assert phase.items["fragmentation"] == int(0.05 * ours)


def test_a_shared_engine_costs_nothing_beside_the_policys(planned):
    for engine in ("hf", "vllm"):
        own, shared = planned(engine=engine), planned("critic.engine=shared", engine=engine)
        assert shared.seconds == ()
        assert all("critic's engine" not in phase.items for phase in shared.phases)
        assert items(shared, "learn policy").keys() == items(own, "learn policy").keys() - {
            "critic's engine"
        }
        values = items(shared, "values")
        assert {"sampler weights", "KV cache"} <= values.keys()
        assert sum(values.values()) < sum(items(own, "values").values())


def test_a_shared_engine_has_room_for_what_the_critic_reads(planned):
    known = "data.max_prompt_tokens=100"
    assert planned(known, engine="vllm").sampler.longest == 300
    assert planned(known, "critic.engine=shared", engine="vllm").sampler.longest == 8192
    own, shared = planned().sampler, planned("critic.engine=shared").sampler
    assert shared.longest == INSTRUCTIONS + PROMPT + 200 + 300
    assert (own.rows, shared.rows) == (16, 256)


def test_a_shared_engine_of_transformers_holds_two_copies_while_the_critics_weights_arrive(
    planned, large
):
    tiny = ("rollout.max_num_seqs=1", "critic.max_prompt_tokens=1", "critic.max_new_tokens=1")
    values = items(planned("critic.engine=shared", *tiny), "values")
    assert values["sampler weights"] == 2 * bare_skeleton_bytes(large)
    assert values["sync bucket"] > 0


def test_only_models_of_one_shape_share_an_engine(planned, smaller):
    with pytest.raises(ConfigError, match=r"smaller has other weights; set critic.engine: own"):
        planned(f"critic.init={smaller}", "critic.engine=shared")
    found = planned(f"critic.init={smaller}")
    assert found.critic.elements < found.policy.elements


def test_a_partner_is_an_engine_and_nothing_else(planned, smaller, large):
    talks = {"algorithm": Talks(partner_model=smaller), "critic": False}
    alone = planned(algorithm="grpo", critic=False)
    found = planned(**talks)
    weights = bare_skeleton_bytes(smaller)
    assert found.critic is None
    assert [phase.name for phase in found.phases] == [phase.name for phase in alone.phases]
    for phase in ("start", "learn policy", "sync"):
        assert items(found, phase)["partner's engine"] == weights
    [partner] = found.seconds
    # Whoever of the two takes more while the other waits.
    policy = sum(found.sampler.awake.values())
    assert policy + weights > partner.at_work + bare_skeleton_bytes(large)
    assert items(found, "generate")["partner's engine"] == weights
    swapped = planned(algorithm=Talks(partner_model=large), critic=False)
    generate = items(swapped, "generate")  # twice the rows of the policy's engine
    assert generate["partner's engine"] == swapped.seconds[0].at_work
    assert generate["sleeping sampler"] == bare_skeleton_bytes(large)
    vllm = planned(engine="vllm", **talks)
    assert all(
        phase.items["partner's engine"] == pytest.approx(0.3 * 80 * GIB, abs=4)
        for phase in vllm.phases
    )


def test_a_plan_that_writes_prompts_has_longer_rows_and_the_whole_context(planned, smaller):
    found = planned(
        "data.max_prompt_tokens=100",
        algorithm=Talks(partner_model=smaller),
        critic=False,
        engine="vllm",
    )
    assert found.row_tokens == PROMPT + INSTRUCTIONS + 3 * 200
    assert found.sampler.longest == 8192
    assert found.seconds[0].sampler.longest == 8192


def test_servers_have_the_policy_only(planned, monkeypatch):
    with pytest.raises(ConfigError, match="a second language model"):
        planned(engine="vllm_server", gpus=2)


def test_a_second_engine_without_room_is_named(planned):
    cache = "rollout.kv_cache_mb=128"
    found = planned(cache, engine="vllm")
    # 128 MiB over 2 · 12 · 2 · 128 · 4 bytes a token; the context is 8192.
    assert (
        "critic's engine: the cache holds 5461 tokens, and one response may have 8192"
        in found.problems
    )


def recipe_of(large, *overrides, **rollout):
    settings = {**RECIPE, "model": {"name": large}, "algorithm": "ppo", "critic": "generative"}
    return load_recipe(settings | {"rollout": {"max_new_tokens": 200, **rollout}}, overrides)


def test_sharing_the_engine_is_a_way_out_where_it_is_enough(large, smaller):
    machines = Machines(gpus=1, gpu_gib=80.0)
    settings = ["rollout.gpu_memory_utilization=0.5", "model.gradient_checkpointing=true"]
    recipe = recipe_of(large, *settings, engine="vllm")
    told = [way.changes for way in ways_out(recipe, machines, prompt_tokens=PROMPT)]
    assert ("critic.engine=shared",) in told
    for changes in told:
        keys = " ".join(changes).split()
        after = recipe_of(large, *settings, *keys, engine="vllm")
        assert plan(after, machines, prompt_tokens=PROMPT).fits
    other = recipe_of(large, *settings, f"critic.init={smaller}", engine="vllm")
    told = [way.changes for way in ways_out(other, machines, prompt_tokens=PROMPT)]
    assert told
    assert ("critic.engine=shared",) not in told


def test_a_context_that_is_too_large_is_cut_to_what_is_read_and_written(large):
    machines = Machines(gpus=1, gpu_gib=80.0)
    settings = [
        "rollout.kv_cache_mb=160",
        "data.max_prompt_tokens=100",
        "critic.max_new_tokens=300",
    ]
    recipe = recipe_of(large, *settings, engine="vllm")
    [way, *_] = ways_out(recipe, machines)
    row = INSTRUCTIONS + 100 + 200 + 300
    assert way.changes == (f"rollout.max_model_len={row} critic.max_prompt_tokens={row - 300}",)
    after = recipe_of(large, *settings, *way.changes[0].split(), engine="vllm")
    assert plan(after, machines).fits
