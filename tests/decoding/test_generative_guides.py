"""A critic that writes chooses among responses: the same protocol as a value model."""

import dataclasses

import pytest

from llmac.config.schema import ModelConfig
from llmac.core.protocols import SamplingParams
from llmac.decoding import best_of_n
from llmac.decoding.values import CriticSays
from llmac.errors import ConfigError
from llmac.runtime.context import Runtime
from tests.critics.making import CONFIG, bench
from tests.critics.talking import Talker, player, talking


@pytest.fixture
def critic_with(tmp_path):
    """It likes b, and reads a prompt that it is given in characters: `critic_with(engine="shared")`."""
    config = type(CONFIG)(**(CONFIG.to_dict() | {"max_position_embeddings": 128}))
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{{ problem }}:{{ partial }}|")
    runtime = Runtime.create(seed=0, output=None)
    whole = bench(runtime, model=ModelConfig(name=str(tmp_path / "model")))
    yield lambda **settings: talking(
        dataclasses.replace(whole, steps=1),
        lambda text, sample: f"<answer>{text.count('b')}</answer>",
        tmp_path / "t.jinja",
        scale=(0, 10),
        **settings,
    )[0]
    runtime.close()


def test_a_critic_that_writes_picks_the_best_of_n(critic_with):
    critic = critic_with()
    policy = player(Talker(lambda text, sample: text + "abbc"[: sample + 1] + "."))
    sampling = SamplingParams(max_new_tokens=9, seed=0)
    for value in (critic, CriticSays(critic, length_limit=9)):
        [found] = best_of_n(policy, value, ["q"], 4, sampling=sampling)
        assert [c.value for c in found.candidates] == pytest.approx([0.0, 0.1, 0.2, 0.2])
        assert found.chosen.text == "qabb."


def test_a_critic_in_the_policys_engine_guides_nothing(critic_with):
    policy = player(Talker(lambda text, sample: "b"))
    with pytest.raises(ConfigError, match=r"set critic\.engine: own to guide"):
        best_of_n(policy, critic_with(engine="shared"), ["q"], 2, sampling=SamplingParams())
