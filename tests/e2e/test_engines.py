"""Several models that sample in one run: each with its own engine and words, asleep and closed together."""

import contextlib
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmac.config import load_recipe
from llmac.core.protocols import Request, SamplingParams
from llmac.engines.hf_engine import HFEngine
from llmac.errors import ConfigError
from llmac.models.loading import load_tokenizer
from llmac.new_actor import model_named
from llmac.new_engine import Engines
from llmac.runtime.context import Runtime

from .conftest import character_tokenizer


@pytest.fixture
def other(vllm_home, tmp_path):
    """A wider model than the policy, which says other things, with the letters in another order."""
    config = Qwen2Config.from_pretrained(vllm_home)
    config.hidden_size, config.num_attention_heads = 96, 3
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "other")
    character_tokenizer("fedcba=").save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def made(vllm_home, settings):
    """Both engines: `made("vllm", other)` -> (engines, policy's player, other's player)."""
    with contextlib.ExitStack() as cleanup:

        def make(engine, other, **rollout):
            settings["model"] = {"name": str(vllm_home)}
            settings["rollout"] |= {"engine": engine, **rollout}
            recipe = load_recipe(settings)
            runtime = Runtime.create(seed=0, output=None)
            cleanup.callback(runtime.close)
            engines = Engines(recipe, runtime)
            cleanup.callback(engines.close)
            policy = engines.of_policy(load_tokenizer(recipe.model), longest=12)
            return engines, policy, engines.of_other(model_named(recipe.model, other), longest=16)

        yield make


def said(player, text="ab=", new_tokens=8):
    """Token ids and log-probabilities of the greedy answer."""
    params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens)
    request = Request(prompt_ids=player.encode(text), params=params)
    [[answer]] = player.engine.generate([request])
    return answer.token_ids, answer.logprobs


def logprobs(folder, prompt, response, change=None):
    """The same of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change is not None:
        change(model)
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows[range(len(response)), torch.tensor(response)].tolist()


@torch.no_grad()
def shifted(model):
    """Other weights than those of the checkpoint."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "engine",
    [
        "hf",
        pytest.param(
            "vllm",
            marks=[
                pytest.mark.slow,
                pytest.mark.vllm,
                pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
                # vLLM and what it imports use names their own dependencies have deprecated.
                pytest.mark.filterwarnings("ignore"),
            ],
        ),
    ],
)
def test_two_models_sample_side_by_side_and_one_learns_without_the_other(
    engine, made, vllm_home, other
):
    engines, policy, second = made(engine, other)
    assert policy.encode("ab=") == (2, 3, 8)
    assert second.encode("ab=") == (7, 6, 8)
    before, its = said(policy), said(second)
    assert before[1] == pytest.approx(logprobs(vllm_home, (2, 3, 8), before[0]), abs=1e-4)
    assert its[1] == pytest.approx(logprobs(other, (7, 6, 8), its[0]), abs=1e-4)
    engines.sleep()
    assert (said(second), said(policy)) == (its, before)

    new = AutoModelForCausalLM.from_pretrained(vllm_home, dtype=torch.float32)
    shifted(new)
    policy.engine.load_weights(new.named_parameters(), version=3)
    after = said(policy)
    assert after[1] == pytest.approx(logprobs(vllm_home, (2, 3, 8), after[0], shifted), abs=1e-4)
    assert after[1] != pytest.approx(before[1], abs=1e-2)
    assert said(second) == its
    assert (policy.engine.policy_version, second.engine.policy_version) == (3, 0)
    engines.close()
    engines.close()


def test_a_player_reads_and_writes_in_the_words_of_its_tokenizer(made, other):
    _, policy, second = made("hf", other)
    for player, ids in ((policy, (2, 3, 1)), (second, (7, 6, 1))):
        assert player.decode(ids) == "ab<eos>"
        assert player.read(ids) == "ab"
        assert player.encode("ab") == ids[:2]


class Quiet(HFEngine):
    """No model; remembers how it was made and what it was told."""

    policy_version = 0

    def __init__(self, model, tokenizer, **options):
        self.model, self.options, self.told = model, options, []

    def sleep(self):
        self.told.append("sleep")

    def close(self):
        self.told.append("close")


@pytest.fixture
def quiet(monkeypatch):
    """In the place of vLLM."""
    built = []
    monkeypatch.setattr(
        "llmac.engines.vllm_engine.VLLMEngine",
        lambda *arguments, **options: built.append(Quiet(*arguments, **options)) or built[-1],
    )
    return built


def test_all_engines_sleep_and_end_together(made, other, quiet):
    engines, *_ = made("vllm", other)
    engines.sleep()
    engines.close()
    assert [engine.told for engine in quiet] == [["sleep", "close"]] * 2


def test_in_vllm_only_the_policys_engine_gives_memory_back(made, other, quiet, vllm_home):
    made("vllm", other, sleep_level=2, kv_cache_mb=7)
    told = [(e.model, e.options["sleep_level"], e.options["max_model_len"]) for e in quiet]
    assert told == [(str(vllm_home), 2, 12), (other, 0, 16)]
    assert [engine.options["kv_cache_mb"] for engine in quiet] == [7, 7]


def test_servers_have_the_policy_only(settings, other, tmp_path):
    settings["rollout"]["engine"] = "vllm_server"
    recipe = load_recipe(settings)
    engines = Engines(recipe, runtime=None)
    missing = model_named(recipe.model, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"missing is a second model .* set rollout.engine: vllm"):
        engines.of_other(missing)  # before anything of it is read
