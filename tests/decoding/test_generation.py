"""What `llmac generate` refuses before it loads anything."""

import datetime
import decimal
import json

import pytest
from transformers import Qwen2Config

from llmac.cli import main
from llmac.core.categorical_heads import OutcomeClasses, PooledOutcomes
from llmac.core.types import Finish, Prompt
from llmac.core.value_heads import Bernoulli, Scalar
from llmac.decoding.candidates import Candidate, Decoded
from llmac.decoding.generation import Generation
from llmac.decoding.values import speaker
from llmac.errors import CheckpointError, ConfigError
from llmac.generate import generate, line
from llmac.models.value_heads import ABOUT_FILE, HEAD_FILE, HeadSpec
from llmac.models.value_model import ValueModel
from tests.decoding.scripted import tiny
from tests.e2e.conftest import character_tokenizer

ROW = ({"prompt": "1+1="},)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("best_of_n", {}, "needs --critic"),
        ("transfer", {"tuned": "x"}, "needs --reference"),
        ("vote", {"critic": "x"}, "--critic has no effect with --method vote"),
        ("best_of_n", {"critic": "x", "block_tokens": 4}, "--block-tokens has no effect"),
        ("token", {"critic": "x", "n": 4}, "--n has no effect"),
        ("vote", {"n": 0}, "--n is 0"),
        ("beam", {"critic": "x", "expand": 0}, "--expand is 0"),
        ("best", {}, "Did you mean 'best_of_n'"),
    ],
)
def test_options_must_fit_the_method(method, options, message):
    with pytest.raises(ConfigError, match=message):
        Generation(model="m", method=method, prompts=ROW, options=options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "there are no prompts"),
        ({"prompts": ({"question": "?"},)}, "row 0 .* columns are question"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
    ],
)
def test_what_cannot_be_answered_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Generation(**{"model": "m", "method": "vote", "prompts": ROW, "options": {}, **changes})


def test_folders_without_what_is_needed_say_what_they_lack(tmp_path):
    def ask(model, critic):
        options = {"critic": critic}
        return generate(
            Generation(model=str(model), method="best_of_n", prompts=ROW, options=options)
        )

    (tmp_path / "config.yaml").write_text("model: {name: start/policy}\n")
    with pytest.raises(CheckpointError, match=r"no final/ model.*start/policy"):
        ask(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="not a value model"):
        ask("m", tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        ask("m", tmp_path / "nowhere")


def test_the_command_line_speaks_of_mistakes_in_one_message(capsys, tmp_path):
    assert main(["generate", "m", "--method", "vote", "--prompt", "x", "--critic", "c"]) == 1
    assert "--critic has no effect" in capsys.readouterr().err
    (tmp_path / "out.jsonl").touch()
    there = str(tmp_path / "out.jsonl")
    assert main(["generate", "m", "--method", "vote", "--prompt", "x", "--output", there]) == 1
    assert "exists" in capsys.readouterr().err


def test_columns_that_json_has_no_word_for_are_written_as_text():
    columns = {"when": datetime.date(2020, 1, 2), "cost": decimal.Decimal("1.5"), "raw": b"x"}
    prompt = Prompt(id="p", token_ids=(1,), source="?", columns=columns)
    only = Candidate(response_ids=(1,), text="", finish=Finish.STOP, logprob=0.0)
    said = line(Decoded(prompt=prompt, chosen=only, candidates=(only,), sampled_tokens=1))
    assert json.loads(said)["columns"] == {"when": "2020-01-02", "cost": "1.5", "raw": "b'x'"}


def model_at(folder, letters="abcdef=", *, head=None, vocabulary=9):
    """A folder with a configuration, and a tokenizer or a head; no weights."""
    Qwen2Config(vocab_size=vocabulary, hidden_size=16).save_pretrained(folder)
    if letters:
        character_tokenizer(letters).save_pretrained(folder)
    if head is not None:
        (folder / HEAD_FILE).touch()
        (folder / ABOUT_FILE).write_text(HeadSpec(head=head).to_json())
    return str(folder)


def refused(method, **options):
    with pytest.raises(ConfigError) as caught:
        generate(Generation(method=method, prompts=ROW, **options))
    return str(caught.value)


def test_models_that_are_mixed_have_one_tokenizer(tmp_path):
    model, other = model_at(tmp_path / "m"), model_at(tmp_path / "o", "=fedcba")
    options = {"tuned": model, "reference": other}
    assert "different tokenizers" in refused("transfer", model=model, options=options)


def test_a_critic_reads_the_policys_tokens(tmp_path):
    model = model_at(tmp_path / "m")
    small = model_at(tmp_path / "small", "", head=Scalar(), vocabulary=8)
    said = refused("best_of_n", model=model, options={"critic": small})
    assert "reads 8 tokens" in said
    assert "ids up to 8" in said
    model_at(tmp_path / "run" / "final", "=fedcba")
    (tmp_path / "run" / "config.yaml").write_text("model: {name: start}\n")
    other = model_at(tmp_path / "run" / "final" / "critic", "", head=Scalar())
    said = refused("best_of_n", model=model, options={"critic": other})
    assert "was trained with the tokenizer of" in said


def test_a_critic_of_whole_responses_guides_nothing(tmp_path):
    critic = model_at(tmp_path / "c", "", head=PooledOutcomes())
    said = refused("best_of_n", model="m", options={"critic": critic})
    assert "says no values of single states" in said
    with pytest.raises(ConfigError, match="says no values of single states"):
        speaker(ValueModel(tiny(0).model, HeadSpec(head=PooledOutcomes())))


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (Scalar(), "-inf to inf"),
        (Scalar(bounds=(0.0, 2.0)), "0 to 2"),
        (OutcomeClasses(), "-1 to 1"),
        (Bernoulli(low=-1.0, high=1.0), "-1 to 1"),
    ],
)
def test_values_that_are_no_chances_are_not_taken_for_some(head, found, tmp_path):
    critic = model_at(tmp_path / "c", "", head=head)
    options = {"critic": critic, "scale": "probability"}
    assert f"says values from {found}" in refused("token", model="m", options=options)


def test_chances_are(tmp_path):
    """And the next thing is asked about."""
    model = model_at(tmp_path / "m")
    for head, scale in ((Bernoulli(), "probability"), (Scalar(), "logit")):
        critic = model_at(tmp_path / scale, "", head=head, vocabulary=3)
        options = {"critic": critic, "scale": scale}
        assert "reads 3 tokens" in refused("token", model=model, options=options)
