"""What two processes must agree on; started by test_two_ranks.py through accelerate."""

import random
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from llmac.errors import CheckpointError
from llmac.runtime.checkpoint import CheckpointStore, RandomState
from llmac.runtime.context import Runtime
from llmac.runtime.weights import full_weights


def ranks_talk(runtime: Runtime) -> None:
    assert runtime.world_size == 2
    assert runtime.is_main == (runtime.rank == 0)
    for dtype in (torch.float64, torch.int64, torch.bfloat16):
        mine = torch.tensor([1, 10 * runtime.rank], dtype=dtype)
        total = runtime.sum(mine)
        assert total.dtype == dtype
        assert total.tolist() == [2, 10]
        assert mine.tolist() == [1, 10 * runtime.rank]
    # 2^53 + 1 is no float64: an int64 sum must not go through one.
    assert runtime.sum(torch.tensor(2**52 + runtime.rank)).item() == 2**53 + 1
    every_other = torch.arange(4.0)[::2]
    assert runtime.sum(every_other).tolist() == [0.0, 4.0]
    assert runtime.max(-float(runtime.rank)) == 0.0
    assert numpy.isnan(runtime.max([1.0, numpy.nan][runtime.rank]))
    assert runtime.gather({"rank": runtime.rank}) == [{"rank": 0}, {"rank": 1}]
    assert runtime.broadcast(f"from {runtime.rank}") == "from 0"


def ranks_draw_differently(runtime: Runtime) -> None:
    runtime.seed(0)
    drawn = (random.random(), numpy.random.rand(), float(torch.rand(())))
    first, second = runtime.gather(drawn)
    assert all(a != b for a, b in zip(first, second, strict=True))


def any_split_has_the_gradient_of_the_whole(runtime: Runtime) -> None:
    """Rank 0 has two micro-batches, rank 1 one; weights differ; the reference sees all rows."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    reference = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    reference.load_state_dict(module.state_dict())
    rows = torch.randn(7, 3, dtype=torch.float64)
    (reference(rows).square().sum() / 7).backward()

    module.register_buffer("angles", torch.ones(2))  # as rotary embeddings have; see the look below
    if runtime.rank == 1:  # prepare must bring rank 0's weights
        nn.init.zeros_(module[0].weight)  # type: ignore[arg-type]
    trained = runtime.train(
        module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), max_norm=1e-3
    )
    parts = [rows[0:1], rows[1:4]] if runtime.rank == 0 else [rows[4:7]]
    weight = float(runtime.sum(torch.tensor(sum(map(len, parts)))))
    for index, part in enumerate(parts):
        with trained.accumulate(sync=index == len(parts) - 1):
            total = trained.learning(part).square().sum()
            trained.backward(total * runtime.gradient_scale / weight)
    for got, want in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)

    with torch.no_grad():  # ranks may look at different numbers of rows without waiting
        for _ in range(runtime.rank):
            trained.looking(rows)
    norm = trained.step(lr=0.1)
    norms = runtime.gather(norm.item())
    assert norms[0] == norms[1] > 1e-3
    after = [parameter.tolist() for parameter in module.parameters()]
    first, second = runtime.gather(after)
    assert first == second
    assert trained.inner is module
    assert [name for name, _ in full_weights(trained.learning)] == list(module.state_dict())


class PerRank:
    """Rank 1 may fail; each rank writes its own file."""

    def __init__(self, runtime: Runtime, *, fails: bool = False) -> None:
        self.runtime, self.fails, self.content = runtime, fails, f"rank {runtime.rank}"

    def save(self, directory: Path) -> None:
        if self.fails and self.runtime.rank == 1:
            raise OSError("disk of rank 1 is full")
        (directory / f"{self.runtime.rank}.txt").write_text(self.content)

    def load(self, directory: Path) -> None:
        self.content = (directory / f"{self.runtime.rank}.txt").read_text()


def ranks_save_together(runtime: Runtime, directory: Path) -> None:
    store = CheckpointStore(directory, keep_last=2, runtime=runtime, fingerprint="a")
    store.save(1, {"state": PerRank(runtime), "random": RandomState(runtime)})
    expected = torch.rand(())
    with pytest.raises(CheckpointError, match="rank 1: disk of rank 1 is full"):
        store.save(2, {"state": PerRank(runtime, fails=True), "random": RandomState(runtime)})
    state = PerRank(runtime)
    state.content = ""
    assert store.restore_latest({"state": state, "random": RandomState(runtime)}) == 1
    assert state.content == f"rank {runtime.rank}"
    assert torch.rand(()) == expected
    # Rank 1's file is damaged: both ranks skip the checkpoint.
    saved = store.save(3, {"state": PerRank(runtime), "random": RandomState(runtime)})
    if runtime.is_main:
        (saved / "state" / "1.txt").write_text("rank 7")
    runtime.barrier()
    assert store.restore_latest({"state": state, "random": RandomState(runtime)}) == 1


def main(directory: Path) -> None:
    runtime = Runtime.create(seed=0, output=directory)
    ranks_talk(runtime)
    ranks_draw_differently(runtime)
    any_split_has_the_gradient_of_the_whole(runtime)
    ranks_save_together(runtime, directory / "checkpoints")
    runtime.start_trackers(["tensorboard"], "demo", {"seed": 0})
    runtime.track({"reward/mean": 0.5}, step=1)
    print(f"rank {runtime.rank} agrees", flush=True)
    runtime.close()
    runtime.close()
    again = Runtime.create(seed=1, output=None)
    assert again.gather(again.rank) == [0, 1]
    again.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
