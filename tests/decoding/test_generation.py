"""What `llmac generate` refuses before it loads anything."""

import pytest

from llmac.cli import main
from llmac.decoding.generation import Generation
from llmac.errors import CheckpointError, ConfigError
from llmac.generate import generate

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
