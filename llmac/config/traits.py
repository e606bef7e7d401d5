"""What critics say of themselves besides how they are built: read here, and nowhere else."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmac.config.cards import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a recipe has to fit. A critic's settings may have any of these under the same name.

    As a field, a constant of the class or a property; a critic that has none is as is written here.
    """

    least_group_size: int = 1
    """Responses to a prompt that it needs; above 1: it compares them with each other."""
    says_prompt_values: bool = False
    """Whether it says what prompts are worth before anything is sampled."""
    repeats_the_plan: bool = False
    """Whether it knows nothing but what a plan that samples trees has found out."""
    continuations: int = 0
    """Continuations that it samples of each state it is asked about; 0: it samples nothing."""
    writes_prompts: bool = False
    """Whether it asks the policy's engine about texts that are no row of the data."""
    reuse: bool = False
    """Whether it offers what it sampled to be trained on."""


def traits_of(critic: Choice | None) -> Traits:
    """Those of a critic; of none, those of a critic that says nothing of itself."""
    if critic is None:
        return Traits()
    # The one place that asks for parts which not every critic has.
    said: dict[str, Any] = {
        entry.name: getattr(critic.settings, entry.name, entry.default)
        for entry in dataclasses.fields(Traits)
    }
    return Traits(**said)
