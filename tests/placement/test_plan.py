"""Phases, their laws, what does not fit, and the way out."""

import itertools
import json
import math

import pytest
import torch

from llmac.cli import main
from llmac.config import load_recipe
from llmac.config.schema import ModelConfig
from llmac.engines.row_cache import RowCache
from llmac.errors import ConfigError
from llmac.placement.plan import GIB, Machines, plan
from llmac.placement.sampling import GRAPHS, hf_sampler, vllm_sampler
from llmac.placement.sharding import Sharding
from llmac.placement.skeletons import Skeleton, bare_skeleton
from llmac.placement.ways_out import ways_out

from .making import RECIPE, folder_of

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
ENGINES = ["hf", "vllm", "vllm_server"]


@pytest.fixture
def large_recipe(tmp_path):
    """A recipe over a model of 220 million parameters: `large_recipe("ppo", "actor.minibatches=2")`."""
    folder = folder_of(tmp_path / "large", **LARGE)

    def recipe(algorithm="ppo", *overrides):
        settings = {**RECIPE, "model": {"name": folder}, "algorithm": {"name": algorithm}}
        return load_recipe(settings, overrides)

    return recipe


def on(gpus=2, gib=80.0, **more):
    return Machines(gpus=gpus, gpu_gib=gib, **more)


def totals(found):
    return {phase.name: phase.total for phase in found.phases}


def test_phases_are_those_of_a_run(recipe_of):
    names = ["start", "generate", "learn policy", "learn critic", "sync"]
    assert list(totals(plan(recipe_of("ppo"), on()))) == names
    assert list(totals(plan(recipe_of("grpo"), on()))) == [n for n in names if "critic" not in n]


def test_the_head_of_a_critic_is_counted(large_recipe):
    def size(*critic):
        shape = plan(large_recipe("ppo", *critic), on()).critic
        return 0 if shape is None else shape.elements

    scalar, atoms = size(), size("critic.name=two_hot", "critic.bins=11")
    assert atoms - scalar == 10 * (LARGE["hidden_size"] + 1)
    assert size("critic.name=group_mean", "algorithm.group_size=2") == 0


def test_a_target_network_is_a_second_critic(large_recipe):
    def parameters(*critic):
        [start, *_] = plan(large_recipe("ppo", *critic), on()).phases
        return start.items["critic parameters"]

    assert parameters("critic.target_tau=0.01") == 2 * parameters()


def test_a_server_is_a_phase_and_leaves_the_trainers_alone(large_recipe):
    recipe = large_recipe("grpo", "rollout.engine=vllm_server", "rollout.server_count=2")
    split = plan(recipe, on(gpus=4))
    assert (split.training_gpus, split.serving_gpus) == (2, 2)
    assert split.phases[-1].name == "server"
    for phase in split.phases[:-1]:
        assert not {"sampler weights", "KV cache", "sleeping sampler"} & phase.items.keys()


def test_servers_started_elsewhere_take_no_gpu_here(large_recipe):
    urls = "rollout.servers=[http://b:8000, http://b:8001]"
    split = plan(
        large_recipe("grpo", "rollout.engine=vllm_server", urls, "rollout.tensor_parallel_size=2"),
        on(gpus=4),
    )
    assert (split.training_gpus, split.serving_gpus) == (4, 4)


def test_the_update_happens_without_activations(large_recipe):
    found = plan(
        large_recipe("grpo", "actor.max_tokens_per_microbatch=600"),
        on(gib=200, sharding=Sharding.ZERO1),
    )
    for phase in found.phases:
        assert not ("activations" in phase.items and "optimizer's step" in phase.items)


def test_a_row_longer_than_the_budget_is_a_micro_batch(recipe_of):
    recipe = recipe_of("grpo", "actor.max_tokens_per_microbatch=10")
    assert plan(recipe, on(), prompt_tokens=100).micro_batch == 100 + 32


def test_a_micro_batch_has_no_more_than_all_rows(recipe_of):
    # 16 prompts on 2 GPUs in 2 minibatches: 4 prompts x 8 responses of at most 10 + 32 tokens.
    recipe = recipe_of("grpo", "actor.minibatches=2", "actor.max_tokens_per_microbatch=99999")
    assert plan(recipe, on(), prompt_tokens=10).micro_batch == 4 * 8 * 42


def test_the_reference_is_a_copy_unless_the_policy_has_adapters(recipe_of):
    def reference(*overrides):
        return plan(recipe_of("ppo", *overrides), on()).phases[0].items["reference parameters"]

    whole = bare_skeleton(recipe_of().model).bytes
    assert reference("algorithm.kl_coef=0.1") == whole
    assert reference("algorithm.kl_coef=0.1", "model.lora.r=4") == 0
    assert reference("algorithm.kl_coef=0") == 0


def test_a_reward_model_is_whole_on_every_gpu(tmp_path, recipe_of):
    judge = folder_of(tmp_path / "judge", num_labels=1)
    recipe = recipe_of("ppo", f"reward.functions=[{{model: {judge}}}]")
    with_judge = plan(recipe, on(sharding=Sharding.ZERO3)).phases[0].items["reward models"]
    backbone = bare_skeleton(recipe.model).elements  # tied: the embedding counts once
    assert with_judge == 4 * (backbone + 64)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sharding", list(Sharding))
def test_every_phase_is_the_sum_of_its_items(large_recipe, engine, sharding):
    found = plan(large_recipe("ppo", f"rollout.engine={engine}"), on(gpus=2, sharding=sharding))
    for phase in found.phases:
        assert phase.total == sum(phase.items.values())
        assert min(phase.items.values()) >= 0


@pytest.mark.parametrize("sharding", [Sharding.ZERO3, Sharding.FSDP2])
def test_more_gpus_never_need_more_of_each(large_recipe, sharding):
    recipe = large_recipe("ppo")
    found = [totals(plan(recipe, on(gpus=n, sharding=sharding))) for n in (2, 4, 8, 16)]
    for few, many in itertools.pairwise(found):
        assert all(many[name] <= few[name] for name in few)
    assert found[-1]["learn policy"] < found[0]["learn policy"]


@pytest.mark.parametrize(
    ("knob", "small", "large"),
    [
        ("actor.max_tokens_per_microbatch", 1024, 4096),
        ("rollout.max_new_tokens", 32, 900),
        ("model.logprob_chunk_mb", 1, 64),
        ("rollout.gpu_memory_utilization", 0.2, 0.5),
        ("rollout.sync_bucket_mb", 16, 512),
    ],
)
def test_a_larger_setting_never_needs_less(large_recipe, knob, small, large):
    few, many = (
        totals(plan(large_recipe("ppo", "rollout.engine=vllm", f"{knob}={value}"), on()))
        for value in (small, large)
    )
    assert all(many[name] >= few[name] for name in few)
    assert sum(many.values()) > sum(few.values())


def test_gradient_checkpointing_needs_less(large_recipe):
    plain, checkpointed = (
        totals(plan(large_recipe("ppo", f"model.gradient_checkpointing={on_}"), on()))
        for on_ in ("false", "true")
    )
    assert checkpointed["learn policy"] < plain["learn policy"]
    assert checkpointed["generate"] == plain["generate"]


def test_a_sleeping_engine_gives_its_memory_back(large_recipe):
    def asleep(level):
        recipe = large_recipe("grpo", "rollout.engine=vllm", f"rollout.sleep_level={level}")
        found = plan(recipe, on())
        return found.phases[2].items["sleeping sampler"], found.host

    assert asleep(0) == (int(0.3 * 80 * GIB), 0)
    weights = bare_skeleton(large_recipe().model).elements * 4
    assert asleep(1) == (GRAPHS, 2 * weights)  # two ranks a machine
    assert asleep(2) == (GRAPHS, 0)


SHAPE = Skeleton(
    weights=(),
    layers=2,
    hidden=8,
    heads=4,
    key_heads=2,
    head_size=2,
    intermediate=32,
    vocabulary=10,
    context=64,
)
ON_ONE_GIB = {"gpu_memory": GIB, "share": 0.3, "longest": 64}


def test_vllms_cache_is_what_its_fraction_leaves(recipe_of):
    recipe = recipe_of("grpo", "rollout.engine=vllm", "rollout.enforce_eager=true")
    found = vllm_sampler(SHAPE, recipe.model, recipe.rollout, **ON_ONE_GIB)
    # One pass of 8192 tokens: 4 bytes · (3 · 32 + 4 · 8) = 512 each; 256 rows of 10 logits of 4 + 8 bytes.
    workspace = 8192 * 512 + 256 * 10 * 12
    assert found.awake["sampler workspace"] == workspace
    assert found.cache == int(0.3 * GIB) - workspace
    # A token: keys and values, 2 layers, 2 heads of 2, 4 bytes.
    assert found.cache_tokens == found.cache // (2 * 2 * 2 * 2 * 4)


def test_tensor_parallelism_divides_weights_and_cache_but_not_a_single_key_head(recipe_of):
    def tokens_and_cache(span):
        recipe = recipe_of(
            "grpo",
            "rollout.engine=vllm",
            "rollout.kv_cache_mb=1",
            f"rollout.tensor_parallel_size={span}",
        )
        return vllm_sampler(SHAPE, recipe.model, recipe.rollout, **ON_ONE_GIB).cache_tokens

    # Two key heads: on two GPUs each holds one, on four GPUs too.
    assert tokens_and_cache(2) == 2 * tokens_and_cache(1)
    assert tokens_and_cache(4) == tokens_and_cache(2)


@pytest.mark.parametrize("new_tokens", [8, 300, 700])
def test_the_transformers_engines_cache_is_what_its_buffers_take(model, recipe_of, new_tokens):
    recipe = recipe_of("grpo", f"rollout.max_new_tokens={new_tokens}")
    skeleton = bare_skeleton(ModelConfig(name=model))
    found = hf_sampler(skeleton, recipe.model, recipe.rollout, rows=3, prompt_tokens=5)
    prompt = [(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16)) for _ in range(3)]
    cache = RowCache(prompt, 3, 5, new_tokens)
    cache.put(0, prompt, torch.zeros(3, dtype=torch.long))
    one = torch.zeros(3, 2, 1, 16)
    for _ in range(new_tokens - 1):  # the last token is drawn, and never read
        for layer in range(3):
            cache.update(one, one, layer)
    buffers = [b for layer in cache._rows_of for b in (layer._keys, layer._values)]
    assert found.cache == sum(b.untyped_storage().nbytes() for b in buffers)


def test_a_critic_that_continues_states_fills_the_transformers_engine(recipe_of):
    settings = "rollout.max_num_seqs=400", "actor.minibatches=1"
    alone = plan(recipe_of("ppo", *settings), on()).sampler
    with_critic = plan(recipe_of("ppo", *settings, "critic=monte_carlo"), on()).sampler
    assert alone.rows < with_critic.rows == 400


def test_the_transformers_engine_holds_two_copies_while_weights_arrive(recipe_of):
    found = plan(recipe_of("grpo"), on())
    generate, sync = found.phases[1].items, found.phases[-1].items
    assert sync["sampler weights"] == 2 * generate["sampler weights"]
    assert found.phases[0].items["sampler weights"] == sync["sampler weights"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpus": 0}, "--gpus is 0; expected at least 1"),
        ({"nodes": -1}, "--nodes is -1"),
        ({"gib": -80.0}, "--gpu-memory is -80"),
        ({"gib": 0.0}, "--gpu-memory is 0"),
        ({"gib": math.nan}, "--gpu-memory is nan"),
        ({"gib": math.inf}, "--gpu-memory is inf"),
    ],
)
def test_machines_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        on(**wrong)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        ([], 3, "16, which 3 processes x 1 minibatches do not divide"),
        (["rollout.engine=vllm", "rollout.tensor_parallel_size=3"], 8, "not divide the 8 GPUs"),
        (["rollout.engine=vllm", "rollout.tensor_parallel_size=8"], 8, "the 4 attention heads"),
        (["rollout.engine=vllm_server", "rollout.server_count=2"], 2, "none is left to train"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(recipe_of, overrides, gpus, message):
    with pytest.raises(ConfigError, match=message):
        plan(recipe_of("grpo", *overrides), on(gpus=gpus))


def test_a_prompt_has_tokens(recipe_of):
    with pytest.raises(ConfigError, match="--prompt-tokens is 0"):
        plan(recipe_of(), on(), prompt_tokens=0)


def applied(way, algorithm, large_recipe, machines, *overrides):
    """The plan after a way out, written as a user would write it."""
    flags = {"--zero 1": "zero1", "--zero 2": "zero2", "--zero 3": "zero3"}
    flags["--offload"] = "zero3_offload"
    words = " ".join(way.changes)
    keys = [word for word in words.split() if "=" in word]
    [sharding] = [flags[flag] for flag in flags if flag in words] or ["ddp"]
    machines = on(machines.gpus, machines.gpu_gib, sharding=Sharding(sharding))
    return plan(large_recipe(algorithm, *overrides, *keys), machines)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("gib", [24.0, 10.0, 5.0])
def test_a_way_out_is_valid_and_fits(large_recipe, engine, algorithm, gib):
    machines = on(gpus=4 if engine != "vllm_server" else 5, gib=gib)
    given = [f"rollout.engine={engine}", "rollout.max_new_tokens=512"]
    given += ["actor.max_tokens_per_microbatch=16384"]
    recipe = large_recipe(algorithm, *given)
    found, ways = plan(recipe, machines), ways_out(recipe, machines)
    assert found.fits == (found.shortfall == 0)
    assert not (found.fits and ways)
    for way in ways:
        after = applied(way, algorithm, large_recipe, machines, *given)
        assert after.fits
        assert max(phase.total for phase in after.phases) == way.highest


def test_of_one_knob_the_mildest_setting_is_told(large_recipe):
    given = ["rollout.engine=vllm", "actor.max_tokens_per_microbatch=16384"]
    recipe, machines = large_recipe("grpo", *given), on(gpus=1, gib=21.0)
    told = {change for way in ways_out(recipe, machines) for change in way.changes}
    tokens = [c for c in told if c.startswith("actor.max_tokens_per_microbatch")]
    assert tokens == ["actor.max_tokens_per_microbatch=8192"]


def test_vllm_gives_up_no_more_of_the_gpu_than_it_must(large_recipe):
    def fits(fraction):
        key = f"rollout.gpu_memory_utilization={fraction}"
        return plan(large_recipe("ppo", "rollout.engine=vllm", key), on(gpus=1, gib=30.0)).fits

    recipe = large_recipe("ppo", "rollout.engine=vllm", "rollout.gpu_memory_utilization=0.9")
    [told] = [
        change
        for way in ways_out(recipe, on(gpus=1, gib=30.0))
        for change in way.changes
        if "utilization" in change
    ]
    fraction = float(told.partition("=")[2])
    assert 0.1 < fraction < 0.85
    assert fits(fraction)
    assert not fits(round(fraction + 0.05, 2))


def test_nothing_helps_where_the_context_alone_fills_the_gpu(large_recipe):
    recipe, machines = large_recipe("ppo"), on(gpus=1, gib=0.5)
    assert not plan(recipe, machines).fits
    assert ways_out(recipe, machines) == ()


def test_a_cache_below_the_models_context_names_max_model_len(large_recipe):
    recipe = large_recipe("grpo", "rollout.engine=vllm", "rollout.kv_cache_mb=64")
    found = plan(recipe, on())
    # 64 MiB over 2 · 12 · 2 · 128 · 4 bytes a token; the model's context is 4096.
    assert found.problems == (
        "sampler: the cache holds 2730 tokens, and one response may have 4096",
    )
    assert ways_out(recipe, on())[0].changes == ("rollout.max_model_len=544",)


def test_no_context_is_advised_for_prompts_that_a_plan_writes_itself(large_recipe):
    recipe = large_recipe("critique_rl", "rollout.engine=vllm", "rollout.kv_cache_mb=64")
    assert any("the cache holds 2730 tokens" in problem for problem in plan(recipe, on()).problems)
    told = [change for way in ways_out(recipe, on()) for change in way.changes]
    assert not [change for change in told if "max_model_len" in change]


def longest(recipe, **known):
    return plan(recipe, on(), **known).sampler.longest


def test_vllms_context_is_the_longest_request_that_is_known(large_recipe):
    vllm = ["rollout.engine=vllm", "data.max_prompt_tokens=100"]
    assert longest(large_recipe("grpo", *vllm)) == 100 + 32
    assert longest(large_recipe("grpo", *vllm), prompt_tokens=70) == 70 + 32
    assert longest(large_recipe("grpo", *vllm, "rollout.max_model_len=900")) == 900
    assert longest(large_recipe("grpo", *vllm, "rollout.max_new_tokens=8000")) == 4096
    assert longest(large_recipe("grpo", vllm[0])) == 4096  # nobody says how long prompts are


def test_vllms_context_holds_the_requests_of_evaluation(large_recipe):
    vllm = ["rollout.engine=vllm", "data.max_prompt_tokens=100"]
    held_out = "evaluation={data: {name: rows.jsonl, prompt: '{question}'}, max_new_tokens: 50}"
    assert longest(large_recipe("grpo", *vllm, held_out)) == 100 + 50
    assert (
        longest(large_recipe("grpo", *vllm, held_out, "evaluation.data.max_prompt_tokens=300"))
        == 300 + 50
    )


def test_a_server_started_elsewhere_sees_no_prompts(large_recipe):
    server = ["rollout.engine=vllm_server", "data.max_prompt_tokens=100"]
    assert longest(large_recipe("grpo", *server)) == 100 + 32
    assert longest(large_recipe("grpo", *server, "rollout.servers=[http://b:8000]")) == 4096


@pytest.mark.parametrize(
    ("given", "share"), [([], 0.9), (["rollout.gpu_memory_utilization=0.5"], 0.5)]
)
def test_a_server_takes_its_gpu_unless_the_recipe_says(large_recipe, given, share):
    server = plan(large_recipe("grpo", "rollout.engine=vllm_server", *given), on()).phases[-1]
    parts = ("sampler weights", "KV cache", "sampler workspace")
    assert sum(server.items[part] for part in parts) == int(share * 80 * GIB)


def test_copies_of_weights_are_held_for_a_pass_under_ddp_only(large_recipe):
    def copies(sharding):
        # So few tokens that weights outweigh activations.
        settings = ("model.compute_dtype=bfloat16", "model.gradient_checkpointing=true")
        recipe = large_recipe("grpo", *settings, "actor.max_tokens_per_microbatch=1")
        found = plan(recipe, on(sharding=sharding), prompt_tokens=1)
        return found.phases[2].items.get("bfloat16 copies of weights", 0)

    everything = bare_skeleton(large_recipe().model).matrices * 2
    assert copies(Sharding.DDP) == everything
    for sharding in set(Sharding) - {Sharding.DDP}:
        assert copies(sharding) < everything / 4, sharding


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """A recipe on disk over the large configuration."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "large", **LARGE)
    (tmp_path / "r.yaml").write_text(
        "model: {name: ./large}\ndata: {name: rows.jsonl, prompt: '{question}'}\n"
        "reward: rewards.py:exact\nalgorithm: {name: ppo}\nrun: {steps: 10, output: runs/a}\n"
        "rollout: {engine: vllm}\n"
    )
    return "r.yaml"


def test_the_command_ends_with_0_when_it_fits_and_3_when_not(recipe_file, capsys):
    assert main(["plan", recipe_file, "--gpus", "8", "--gpu-memory", "80"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("fits")
    assert main(["plan", recipe_file, "--gpus", "1", "--gpu-memory", "8"]) == 3
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--zero", "1"], ["--offload"], ["--fsdp2"], ["--nodes", "2"]])
def test_the_table_has_at_most_100_columns(recipe_file, capsys, flags):
    engine = "rollout.engine=vllm_server"
    main(
        [
            "plan",
            recipe_file,
            engine,
            "actor.prompts_per_step=210",
            "--gpus",
            "8",
            "--gpu-memory",
            "8",
            *flags,
        ]
    )
    out = capsys.readouterr().out
    assert "GiB on the fullest GPU" in out
    assert max(map(len, out.splitlines())) <= 100


def test_json_says_the_same_in_bytes(recipe_file, capsys):
    command = ["plan", recipe_file, "--gpus", "1", "--gpu-memory", "8", "--json"]
    assert main(command) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["problems"]
    assert told["policy"]["parameters"] == told["policy"]["trainable"]
    for phase in told["phases"]:
        assert phase["total_bytes"] == sum(phase["bytes"].values())
    found = plan(load_recipe(recipe_file), on(gpus=1, gib=8.0))
    assert [p["total_bytes"] for p in told["phases"]] == [p.total for p in found.phases]


def test_a_flag_chooses_how_training_is_spread(recipe_file, capsys):
    flags = {
        "": "ddp",
        "--zero 2": "zero2",
        "--zero 3": "zero3",
        "--offload": "zero3_offload",
        "--fsdp2": "fsdp2",
    }
    for flag, sharding in flags.items():
        main(["plan", recipe_file, "--gpus", "8", "--gpu-memory", "80", "--json", *flag.split()])
        assert json.loads(capsys.readouterr().out)["sharding"] == sharding


def test_a_mistake_is_one_message_and_exit_code_1(recipe_file, capsys):
    assert main(["plan", recipe_file, "--gpus", "0", "--gpu-memory", "80"]) == 1
    assert capsys.readouterr().err == "error: --gpus is 0; expected at least 1\n"
    assert main(["plan", recipe_file, "model.name=./no", "--gpus", "1", "--gpu-memory", "8"]) == 1
    assert "no model configuration at" in capsys.readouterr().err
