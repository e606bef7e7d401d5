"""The picture shows what the file says, also while the run goes on."""

import json

import pytest

from llmac.curves import learning_curve, plot_learning_curve

STEPS = [
    {"step": 0, "eval/held_out/pass@1": 0.2},
    {"step": 1, "reward/mean": 0.25, "critic/vf_explained_var": -3.0},
    {"step": 2, "reward/mean": 0.5, "critic/vf_explained_var": None},
    {"step": 3, "reward/mean": 0.75, "critic/vf_explained_var": 0.5, "eval/held_out/pass@1": 0.9},
]


def drawn(axes):
    line = axes.get_lines()[0]
    return list(line.get_xdata()), list(line.get_ydata())


def test_each_panel_has_the_steps_and_values_of_its_metric():
    reward, accuracy, explained = learning_curve(STEPS, title="ppo on chain").axes
    assert drawn(reward) == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert drawn(accuracy) == ([0, 3], [0.2, 0.9])
    assert drawn(explained) == ([1, 3], [-3.0, 0.5])
    assert "Reward" in reward.get_title(loc="left")
    assert explained.get_ylim()[0] > -1.2  # one bad step does not flatten the others


def test_a_last_value_far_below_the_picture_is_written_at_its_edge():
    (panel,) = learning_curve([{"step": 1, "critic/vf_explained_var": -50.0}], title="").axes
    [label] = panel.texts
    assert label.get_text() == "-50.00"
    assert label.xy == (1, -1.0)


def test_a_long_run_is_smoothed_with_the_values_behind():
    steps = [{"step": s, "reward/mean": float(s % 2)} for s in range(200)]
    (panel,) = learning_curve(steps, title="").axes
    faint, smooth = panel.get_lines()
    assert list(faint.get_ydata()) == [s % 2 for s in range(200)]
    # half width 200 // 40 = 5: of the neighbours 95 to 105 six are odd
    assert smooth.get_ydata()[100] == pytest.approx(6 / 11)


def test_rewards_outside_zero_and_one_keep_their_scale():
    steps = [{"step": s, "reward/mean": -5.0 - s} for s in range(3)]
    (panel,) = learning_curve(steps, title="").axes
    assert panel.get_ylim()[1] < 0


@pytest.mark.parametrize("text", ["", json.dumps(STEPS[1]) + "\n" + '{"step": 2, "rew'])
def test_the_picture_of_an_unfinished_run_is_written(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    picture = plot_learning_curve(path, tmp_path / "pictures" / "curve.png", title="$grpo_ on a_b")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 5000
