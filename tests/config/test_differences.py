"""What a folder's configuration and this run's do not have in common."""

import pytest

from llmac.config import differences, dump, load_recipe


@pytest.fixture
def saved(settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(load_recipe(settings)))
    return path


def test_only_what_makes_it_another_run_is_named(settings, saved):
    assert differences(load_recipe(settings), saved) == []
    may = ["run.steps=77", "actor.packing=padded", "actor.max_tokens_per_microbatch=99"]
    assert differences(load_recipe(settings, may), saved) == []
    other = load_recipe(settings, [*may, "algorithm.group_size=3", "actor.lr=0.5"])
    before = load_recipe(settings)
    assert differences(other, saved) == [
        f"algorithm.group_size is {before.algorithm.settings.group_size} there and 3 here",
        f"actor.lr is {before.actor.lr} there and 0.5 here",
    ]


def test_keys_of_one_side_alone_are_named(settings, saved):
    found = differences(load_recipe(settings, ["algorithm=ppo"]), saved)
    assert "algorithm.scale is group there and nothing here" in found
    assert "algorithm.lam is nothing there and 1.0 here" in found


@pytest.mark.parametrize("text", [None, "", "- a list"])
def test_where_nothing_is_saved_nothing_is_known(settings, saved, text):
    saved.unlink() if text is None else saved.write_text(text)
    assert differences(load_recipe(settings, ["algorithm.group_size=3"]), saved) == []
