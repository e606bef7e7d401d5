"""Whether a value model knows the policy it is to guide, and responses as long as those it is asked about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmac.config.loading import read_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a critic learned from."""

    policy: str
    """Hub id or folder."""
    response_tokens: int | None
    """Length at which its responses were cut; None: not known."""


def provenance(critic: Path) -> Provenance | None:
    """What the `config.yaml` beside or above a critic's folder says of it; None: there is none.

    A run keeps its critic in `final/critic`, beside the policy that it was trained with at the end; `llmac
    value-pretrain` keeps it in `critic`, and the policy is the recipe's.
    """
    critic = critic.resolve()
    for folder in critic.parents[:2]:
        if not (folder / "config.yaml").is_file():
            continue
        recipe: dict[str, Any] = read_yaml(folder / "config.yaml")
        final = critic.parent if critic.parent.name == "final" else None
        name = final or recipe.get("model", {}).get("name")
        if name is None:
            return None
        length = recipe.get("rollout", {}).get("max_new_tokens")
        return Provenance(policy=str(name), response_tokens=length)
    return None


def misfits(known: Provenance | None, *, policy: str, response_tokens: int) -> list[str]:
    """What to warn of before a critic guides a policy, a sentence each.

    Args:
        known: of the critic; None: nothing can be said.
        policy: Hub id or folder of the one that is guided.
        response_tokens: of the longest response that it may give.
    """
    if known is None:
        return []
    found: list[str] = []
    if _place(known.policy) != _place(policy):
        found.append(
            f"the critic was trained on responses of {known.policy}, and guides {policy}: what a state is worth "
            "depends on who goes on from there"
        )
    if known.response_tokens is not None and response_tokens > known.response_tokens:
        found.append(
            f"the critic was trained on responses of up to {known.response_tokens} tokens, and is asked about up to "
            f"{response_tokens}: its values of longer ones are guesses"
        )
    return found


def _place(name: str) -> str:
    """A folder by its whole path; a Hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.exists() else name
