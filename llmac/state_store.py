"""States with their true values in a file, so that many critics are compared on the same truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmac.critics.states import States
from llmac.errors import DataError
from llmac.rollout_store import read_store, write_rollouts


def write_states(path: Path, states: States, about: Mapping[str, Any]) -> None:
    """Write states into a rollout file: its `monte_carlo` column holds their values, its description the rest.

    Args:
        path: of the Parquet file; folders above are made if need be.
        states: as sampled.
        about: how they came about; JSON.

    Raises:
        DataError: a prompt's column does not fit into such a file.
    """
    estimates: list[list[float | None]] = [
        [None] * len(trajectory.response_ids) for trajectory in states.trajectories
    ]
    places = zip(states.row.tolist(), states.position.tolist(), strict=True)
    for (row, position), value in zip(places, states.value.tolist(), strict=True):
        estimates[row][position] = value
    description = {
        "row": states.row.tolist(),
        "position": states.position.tolist(),
        "depth": states.depth.tolist(),
        "outcomes": states.outcomes.tolist(),
        "success_above": states.success_above,
        "length_limit": states.length_limit,
    }
    write_rollouts(
        path, states.trajectories, {**about, "states": description}, monte_carlo=estimates
    )


def read_states(path: Path) -> tuple[States, Mapping[str, Any]]:
    """The states that `write_states` wrote, equal to what it was given, and how they came about.

    Raises:
        DataError: there is no such file, or it holds responses without states.
    """
    stored = read_store(path)
    about = dict(stored.about)
    said: Mapping[str, Sequence[Any]] | None = about.pop("states", None)
    if said is None:
        raise DataError(
            f"{path} holds responses without Monte-Carlo states; write some with `llmac eval-critic --save-states`"
        )
    states = States(
        trajectories=stored.trajectories,
        row=torch.tensor(said["row"]),
        position=torch.tensor(said["position"]),
        depth=torch.tensor(said["depth"]),
        outcomes=torch.tensor(said["outcomes"]),
        success_above=float(said["success_above"]),  # pyright: ignore[reportArgumentType]
        length_limit=int(said["length_limit"]),  # pyright: ignore[reportArgumentType]
    )
    return states, about
