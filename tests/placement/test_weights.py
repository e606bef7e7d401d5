"""Parameters, gradients and optimizer: counted, and compared with what PyTorch allocates."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model

from llmac.config.schema import LoraConfig, ModelConfig
from llmac.critics.value_head import ValueHeadConfig
from llmac.errors import ConfigError
from llmac.models.value_model import ValueModel
from llmac.placement.sharding import Sharding, held
from llmac.placement.skeletons import (
    Skeleton,
    Weight,
    bare_skeleton,
    critic_skeleton,
    policy_skeleton,
)

from .making import folder_of
from .measuring import storage_bytes

SIZES = {
    "layers": 1,
    "hidden": 10,
    "heads": 2,
    "key_heads": 2,
    "head_size": 4,
    "intermediate": 32,
    "vocabulary": 100,
    "context": None,
}


def weight(*shape, item_bytes=4, trainable=True, block=0):
    return Weight(shape=shape, item_bytes=item_bytes, trainable=trainable, linear=True, block=block)


def module(*weights):
    return Skeleton(weights=weights, **SIZES)


def adamw_step(model):
    """One real update; returns the optimizer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    sum(p.float().sum() for p in trainable).backward()
    optimizer.step()
    return optimizer


def allocated(model):
    """(parameters, gradients, optimizer) after an update."""
    optimizer = adamw_step(model)
    state = [t for s in optimizer.state.values() for t in s.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return storage_bytes(model.parameters()), storage_bytes(gradients), storage_bytes(state)


def planned(skeleton):
    """The same three by the plan, on one GPU."""
    found = held(skeleton, Sharding.DDP, 1)
    return found.parameters, found.gradients, found.optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_training_allocates_what_was_planned(tmp_path, built, dtype, tied):
    folder = folder_of(tmp_path / "model", tie_word_embeddings=tied)
    real = built("qwen2", tie_word_embeddings=tied).to(getattr(torch, dtype))
    skeleton = policy_skeleton(ModelConfig(name=folder, dtype=dtype))
    assert planned(skeleton) == allocated(real)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_allocate_what_was_planned(model, built, dtype):
    lora = LoraConfig(r=4)
    targets = PeftLora(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    real = get_peft_model(built("qwen2").to(getattr(torch, dtype)), targets)
    skeleton = policy_skeleton(ModelConfig(name=model, dtype=dtype, lora=lora))
    assert planned(skeleton) == allocated(real)
    # 3 layers; q and o 64x64, k and v 64x32, three matrices 64x176: r (in + out) each.
    assert skeleton.trainable == 3 * 4 * (2 * 128 + 2 * 96 + 3 * 240)


def test_a_critic_allocates_what_was_planned(model, built):
    critic = ValueModel(built("qwen2").base_model)
    skeleton = critic_skeleton(ModelConfig(name=model), ValueHeadConfig())
    assert planned(skeleton) == allocated(critic)


def test_a_critic_on_the_policys_trunk_is_a_head(model):
    head = critic_skeleton(ModelConfig(name=model), ValueHeadConfig(trunk="shared"))
    assert head.elements == head.trainable == 64 + 1


def test_a_critic_with_adapters_trains_them_and_its_head(model):
    spec = ModelConfig(name=model, lora=LoraConfig(r=4))
    full, adapted = (
        critic_skeleton(spec, ValueHeadConfig(lora=lora)).trainable for lora in (False, True)
    )
    assert adapted == 3 * 4 * (2 * 128 + 2 * 96 + 3 * 240) + 65
    assert adapted < full


def test_tied_weights_count_once_and_as_a_matrix_of_the_head(tmp_path):
    tied, untied = (
        bare_skeleton(ModelConfig(name=folder_of(tmp_path / str(t), tie_word_embeddings=t)))
        for t in (True, False)
    )
    assert untied.elements - tied.elements == 101 * 64
    assert tied.matrices == untied.matrices


def test_a_name_without_configuration_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no model configuration at .*folder with the model's"):
        policy_skeleton(ModelConfig(name=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "MambaConfig, which has no attention"),
        ({"model_type": "t5"}, "T5Config, which AutoModelForCausalLM cannot build"),
    ],
)
def test_models_that_cannot_be_planned_are_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        policy_skeleton(ModelConfig(name=str(tmp_path)))


# Two weights, a matrix of 1000 x 100 and a vector of 100: P = 100,100 elements. On 4 ranks DeepSpeed flattens matrices
# and vectors apart and pads each to a multiple of 2 · 4: 25,000 + 26 elements a rank.
PAIR = module(weight(1000, 100), weight(100))
SHARE = 25_000 + 26


@pytest.mark.parametrize(
    ("sharding", "parameters", "gradients", "optimizer"),
    [
        (Sharding.DDP, 400_400, 400_400, 2 * 400_400 + 2 * 4),
        (Sharding.ZERO1, 4 * SHARE * 4, 400_400, SHARE * 12 + 2 * 4),
        (Sharding.ZERO2, 4 * SHARE * 4, SHARE * 4, SHARE * 12 + 2 * 4),
        # Each parameter is cut by itself, 25,000 + 25; the vector has no more than 10 · 10 elements (the threshold for
        # this width) and stays whole besides.
        (Sharding.ZERO3, 25_025 * 4 + 400, 25_025 * 4, 25_025 * 12 + 2 * 4),
        (Sharding.ZERO3_OFFLOAD, 25_025 * 4 + 400, 0, 0),
        (Sharding.FSDP2, 25_025 * 4, 25_025 * 4, 25_025 * 8 + 2 * 4),
    ],
)
def test_float32_weights_cost_what_the_table_says(sharding, parameters, gradients, optimizer):
    found = held(PAIR, sharding, 4)
    assert (found.parameters, found.gradients, found.optimizer) == (
        parameters,
        gradients,
        optimizer,
    )


@pytest.mark.parametrize(
    ("sharding", "parameters", "gradients", "optimizer"),
    [
        (Sharding.DDP, 200_000, 200_000, 2 * 200_000 + 4),
        # 25,000 elements a rank; the optimizer has a float32 master copy and two float32 moments.
        (Sharding.ZERO1, 200_000, 200_000, 25_000 * 12 + 4),
        (Sharding.ZERO2, 200_000, 50_000, 25_000 * 12 + 4),
        (Sharding.ZERO3, 50_000, 50_000, 25_000 * 12 + 4),
        (Sharding.FSDP2, 50_000, 50_000, 2 * 50_000 + 4),
    ],
)
def test_bfloat16_weights_cost_what_the_table_says(sharding, parameters, gradients, optimizer):
    found = held(module(weight(1000, 100, item_bytes=2)), sharding, 4)
    assert (found.parameters, found.gradients, found.optimizer) == (
        parameters,
        gradients,
        optimizer,
    )


def test_offload_moves_gradients_and_optimizer_to_main_memory():
    found = held(module(weight(1000, 100, item_bytes=2)), Sharding.ZERO3_OFFLOAD, 4)
    # 25,000 elements: bfloat16 gradients 2, float32 gradients 4, master copy 4, moments 8.
    assert found.host == 25_000 * (2 + 4 + 4 + 8) + 4
    assert found.optimizer == found.gradients == 0


def test_shards_of_what_does_not_divide_are_those_of_the_fullest_rank():
    odd = module(weight(1001, 100))
    # FSDP2 deals out rows, 251 to the first ranks; ZeRO-3 numbers, 25,025 of 100,100.
    assert held(odd, Sharding.FSDP2, 4).parameters == 251 * 100 * 4
    assert held(odd, Sharding.ZERO3, 4).parameters == 25_025 * 4


def test_gradients_travel_in_buckets_of_their_own_size_between_ddp_processes():
    assert held(PAIR, Sharding.DDP, 1).buffers == 0
    assert held(PAIR, Sharding.DDP, 2).buffers == held(PAIR, Sharding.DDP, 2).gradients


def test_deepspeeds_buckets_are_those_the_runtime_asks_for():
    # A model of width 10 has buckets of the least size, a million gradients; the largest gradient is 100,000.
    million, matrix, everything = 4 * 1_000_000, 4 * 100_000, 4 * 100_100
    assert held(PAIR, Sharding.ZERO1, 4).buffers == million
    assert held(PAIR, Sharding.ZERO2, 4).buffers == million + matrix
    # The bucket, its contents in the order in which they are scattered, and all weights gathered.
    at_stage_3 = held(PAIR, Sharding.ZERO3, 4)
    assert (at_stage_3.buffers, at_stage_3.idle_buffers) == (2 * million + everything, million)


def test_a_gradient_too_large_for_the_bucket_is_whole_beside_it():
    wide = module(weight(3000, 1000))
    assert held(wide, Sharding.ZERO2, 4).buffers == 4 * (1_000_000 + 3_000_000)
    assert held(wide, Sharding.ZERO3, 4).buffers == 4 * (1_000_000 + 3_000_000 + 3_000_000)


def test_deepspeed_casts_a_float32_head_with_its_bfloat16_trunk():
    mixed = module(weight(1000, 100, item_bytes=2), weight(1, 100, item_bytes=4))
    same = module(weight(1000, 100, item_bytes=2), weight(1, 100, item_bytes=2))
    for stage in (Sharding.ZERO1, Sharding.ZERO2, Sharding.ZERO3):
        assert held(mixed, stage, 2) == held(same, stage, 2)
    assert held(mixed, Sharding.DDP, 2) != held(same, Sharding.DDP, 2)


def test_what_does_not_learn_costs_its_parameters_only():
    frozen = module(weight(1000, 100, trainable=False))
    for sharding in Sharding:
        found = held(frozen, sharding, 4)
        assert (found.gradients, found.optimizer, found.host, found.update) == (0, 0, 0, 0)
        assert found.parameters == (100_000 if sharding.cuts_weights else 400_000)


@pytest.mark.parametrize("sharding", [Sharding.ZERO3, Sharding.ZERO3_OFFLOAD, Sharding.FSDP2])
def test_more_gpus_never_hold_more_each(model, sharding):
    skeleton = policy_skeleton(ModelConfig(name=model))
    # One rank gathers nothing; from two on, what is gathered does not depend on how many they are.
    for few, many in [(2, 3), (3, 4), (4, 8), (8, 64)]:
        before, after = (held(skeleton, sharding, ranks) for ranks in (few, many))
        for field in dataclasses.fields(before):
            assert getattr(after, field.name) <= getattr(before, field.name), field.name


def test_a_higher_stage_never_holds_more_state(model):
    skeleton = policy_skeleton(ModelConfig(name=model, dtype="bfloat16"))
    stages = [Sharding.ZERO1, Sharding.ZERO2, Sharding.ZERO3, Sharding.ZERO3_OFFLOAD]
    found = [held(skeleton, sharding, 8) for sharding in stages]
    totals = [h.gradients + h.optimizer for h in found]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) > 2
