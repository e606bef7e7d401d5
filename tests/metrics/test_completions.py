"""Tables of sampled responses: complete, typed, and readable by what people use."""

import pyarrow.parquet
import pytest
import torch

from llmac.completions import CompletionLog, completions_table
from llmac.core.types import Credit, Finish, Prompt, Rollouts, Trajectory


def trajectory(
    response_ids, *, source="1+1=", reward, parts, mask=None, finish=Finish.STOP, text="2"
):
    return Trajectory(
        prompt=Prompt(id="train/0", token_ids=(1, 2), source=source),
        response_ids=response_ids,
        action_mask=mask or (True,) * len(response_ids),
        sampler_logprobs=(0.0,) * len(response_ids),
        finish=finish,
        group=0,
        reward=reward,
        reward_parts=parts,
        response_text=text,
    )


@pytest.fixture
def rollouts():
    trajectories = (
        trajectory((5, 6, 7), reward=1.5, parts={"right": 1.0, "form": 0.5}),
        trajectory(
            (5, 6),
            source=[{"role": "user", "content": "1+1?"}],
            reward=0.0,
            parts={"right": 0.0, "form": None},
            mask=(True, False),
            finish=Finish.LENGTH,
            text="half \ud800 a character",
        ),
        trajectory((), reward=0.0, parts={"right": 0.0}, text=""),
    )
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    zeros = torch.zeros(3, 3)
    return Rollouts(
        response_ids=torch.zeros(3, 3, dtype=torch.long),
        action_mask=mask,
        rewards=zeros,
        truncated=torch.tensor([False, True, False]),
        group=torch.zeros(3, dtype=torch.long),
        sampler_logprobs=zeros,
        old_logprobs=zeros,
        ref_logprobs=None,
        length_limit=3,
        trajectories=trajectories,
    )


def test_a_row_says_everything_about_its_response(rollouts):
    credit = Credit(
        advantages=torch.tensor([[1.0, 3.0, 9.0], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]]),
        policy_mask=rollouts.action_mask & torch.tensor([True, True, False]),
    )
    first, second, empty = completions_table(10, rollouts, credit).to_pylist()
    assert first == {
        "step": 10,
        "prompt_id": "train/0",
        "group": 0,
        "prompt": "1+1=",
        "response": "2",
        "reward": 1.5,
        "reward/right": 1.0,
        "reward/form": 0.5,
        "finish": "stop",
        "tokens": 3,
        "advantage": 2.0,  # (1 + 3) / 2: the third token does not enter the loss
    }
    assert second["prompt"] == "user: 1+1?"
    assert second["response"] == "half \\ud800 a character"
    assert (second["reward/form"], second["finish"], second["tokens"]) == (None, "length", 1)
    assert second["advantage"] == -1.0
    assert (empty["tokens"], empty["advantage"], empty["reward/form"]) == (0, None, None)


def test_every_n_th_step_has_a_file_that_datasets_reads(rollouts, tmp_path):
    log = CompletionLog(tmp_path / "completions", every=10, is_main=True)
    written = [log.log(step, rollouts) for step in range(1, 21)]
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == ["step_000010.parquet", "step_000020.parquet"]
    assert [path.name for path in written if path] == files

    from datasets import Dataset

    table = Dataset.from_parquet(
        [str(path) for path in written if path], cache_dir=str(tmp_path / "cache")
    )
    assert table["step"] == [10] * 3 + [20] * 3
    assert table["reward"] == [1.5, 0.0, 0.0] * 2
    assert table["advantage"] == [None] * 6


def test_a_step_written_again_replaces_its_file(rollouts, tmp_path):
    log = CompletionLog(tmp_path, every=1, is_main=True)
    log.log(1, rollouts)
    path = log.log(1, rollouts.rows(torch.tensor([0])))
    assert pyarrow.parquet.read_table(path).num_rows == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("every", "is_main"), [(0, True), (1, False)])
def test_never_and_other_ranks_write_nothing(rollouts, tmp_path, every, is_main):
    assert CompletionLog(tmp_path / "none", every=every, is_main=is_main).log(1, rollouts) is None
    assert not (tmp_path / "none").exists()
