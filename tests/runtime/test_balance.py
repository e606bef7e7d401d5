"""Groups move whole between ranks; what is learned of them stays the same."""

import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmac.balance import balanced
from llmac.core.types import Finish, Prompt, Trajectory
from llmac.runtime.context import Runtime

ROOT = Path(__file__).parents[2]
UNEVEN, EVEN = SimpleNamespace(uneven=True), SimpleNamespace()


class Talk:
    """What ranks tell each other, as threads."""

    def __init__(self, size):
        self.said, self.wait = [[] for _ in range(size)], threading.Barrier(size, timeout=20)

    def of(self, rank):
        def gather(item):
            self.said[rank].append(item)
            turn = len(self.said[rank]) - 1
            self.wait.wait()
            return [said[turn] for said in self.said]

        return SimpleNamespace(rank=rank, world_size=len(self.said), gather=gather)


def on_ranks(shares, plan=UNEVEN):
    """What each rank has afterwards, the metrics of all, and what was said."""
    talk = Talk(len(shares))
    with ThreadPoolExecutor(len(shares)) as threads:
        done = list(
            threads.map(lambda r: balanced(shares[r], plan, talk.of(r)), range(len(shares)))
        )
    return [rows for rows, _ in done], [metrics for _, metrics in done], talk.said


def row(rank, group, number, length):
    return Trajectory(
        prompt=Prompt(id=f"{rank}-{group}", token_ids=(1, rank, group), source="?"),
        response_ids=(2, *range(number, number + length - 1)),
        action_mask=(True,) * length,
        sampler_logprobs=(-0.5,) * length,
        finish=Finish.STOP,
        group=group,
        reward=1.0,
    )


def share(rank, lengths):
    """Group g has two rows, of `lengths[g]` tokens each; numbered as on every other rank."""
    rows = [row(rank, g, 100 * n, length) for n in (1, 2) for g, length in enumerate(lengths)]
    return sorted(rows, key=lambda t: t.group)


def anonymous(shares):
    return sorted((dataclasses.replace(t, group=0) for rows in shares for t in rows), key=repr)


def loads(metrics):
    return {name: measure.value for name, measure in metrics.items()}


SHARES = [share(0, (60, 20, 40)), share(1, (10,)), share(2, (30, 5))]


def test_nothing_is_lost_or_doubled_and_groups_stay_whole():
    found, _, _ = on_ranks(SHARES)
    assert anonymous(found) == anonymous(SHARES)
    for rows in found:
        prompts = {t.group: t.prompt.id for t in rows}
        assert len(set(prompts.values())) == len(prompts) > 0
        assert all(prompts[t.group] == t.prompt.id for t in rows)
        assert len(rows) == 2 * len(prompts)


def test_what_stays_keeps_order_and_number_and_what_comes_is_behind_it():
    # Loads 3 + 1 + 2·(length - 1): 122, 42, 82 | 22 | 62, 12. Mean 114.
    (first, second, third), _, _ = on_ranks(SHARES)
    assert first == SHARES[0][:2]
    came = [dataclasses.replace(t, group=1) for t in SHARES[0][4:]]
    assert second == SHARES[1] + came
    assert third == SHARES[2] + [dataclasses.replace(t, group=2) for t in SHARES[0][2:4]]


def test_rows_of_a_group_need_not_be_adjacent():
    shuffled = [SHARES[0][i] for i in (4, 0, 2, 5, 1, 3)]
    found, _, _ = on_ranks([shuffled, *SHARES[1:]])
    assert found[0] == [SHARES[0][0], SHARES[0][1]]
    assert [t.prompt.id for t in found[1]] == ["1-0"] * 2 + ["0-2"] * 2


def test_only_what_moves_is_sent():
    _, _, said = on_ranks(SHARES)
    assert said[1:] == [[[22], []], [[62, 12], []]]
    sent = [(rank, group) for rank, group in said[0][1]]
    assert sent == [(2, SHARES[0][2:4]), (1, SHARES[0][4:])]


def test_even_ranks_send_nothing():
    shares = [share(0, (20, 30)), share(1, (50,))]
    found, metrics, said = on_ranks(shares)
    assert found == shares
    assert said == [[[42, 62]], [[102]]]
    assert loads(metrics[0])["rollout/token_imbalance"] == pytest.approx(104 / 103)


def test_a_rank_without_rows_gets_some():
    found, _, _ = on_ranks([[], share(1, (5, 9))])
    assert [[t.prompt.id for t in rows] for rows in found] == [["1-0"] * 2, ["1-1"] * 2]


def test_imbalance_is_reported_by_all_ranks_before_and_after():
    # 246 | 22 | 74 become 122 | 104 | 116.
    _, metrics, _ = on_ranks(SHARES)
    assert [loads(m) for m in metrics] == [
        {
            "rollout/token_imbalance": pytest.approx(3 * 122 / 342),
            "rollout/token_imbalance_sampled": pytest.approx(3 * 246 / 342),
        }
    ] * 3


def test_rows_of_an_even_plan_stay_and_are_measured():
    for plan in (EVEN, SimpleNamespace(uneven=False)):
        found, metrics, _ = on_ranks(SHARES, plan)
        assert found == SHARES
        assert loads(metrics[1]) == {"rollout/token_imbalance": pytest.approx(3 * 246 / 342)}


def test_one_process_keeps_everything_and_reports_nothing():
    runtime = Runtime.create(seed=0, output=None)
    assert balanced(SHARES[0], UNEVEN, runtime) == (SHARES[0], {})
    runtime.close()


@pytest.mark.slow
def test_groups_that_moved_teach_the_same(tmp_path):
    """Two processes learn one step from uneven rows as sampled, and after they were balanced."""
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "accelerate.commands.launch", "--main_process_port", "0"),
            *("--config_file", str(ROOT / "recipes/accelerate/ddp.yaml")),
            str(Path(__file__).with_name("balance_worker.py")),
            str(tmp_path / "found.pt"),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = torch.load(tmp_path / "found.pt")
    before, after = found["sampled"], found["balanced"]
    assert before["imbalance"] > 1.4
    assert after["imbalance"] < 1.1
    assert before["rows"] == [24, 8]
    assert sum(after["rows"]) == 32
    assert after["metrics"] == pytest.approx(before["metrics"], rel=1e-4)
    assert before["moved"] > 1e-2
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=1e-4, atol=2e-5)
