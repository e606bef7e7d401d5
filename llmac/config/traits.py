"""What critics and plans say of themselves besides how they are built: read here, and nowhere else."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llmac.config.cards import Choice
from llmac.config.schema import Recipe


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
    engine: Literal["own", "shared"] | None = None
    """Who samples for a critic that is a language model and writes: an engine of its own, or the policy's with its
    weights for a while; None: it writes nothing."""
    learns: bool = True
    """Whether it learns, if it has a learning rate at all."""
    says_outcome_chances: bool = False
    """Whether it has classes of outcomes, and says how likely a response's own was after each of its tokens."""
    judges_states: bool = True
    """Whether what it says of a single state is a value, and not a part of its judgement of the whole response."""
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


def learns(critic: Choice | None) -> bool:
    """Whether a critic has a learning rate, and uses it."""
    has_rate = hasattr(critic and critic.settings, "lr")  # not every critic has one
    return has_rate and traits_of(critic).learns


def plan_of(recipe: Recipe) -> object:
    """The algorithm's plan for one prompt a step, to be asked what it needs.

    Raises:
        ValueError: the algorithm's settings make no plan.
    """
    from llmac.core.protocols import SamplingParams  # not light

    sampling = SamplingParams(max_new_tokens=recipe.rollout.max_new_tokens)
    return recipe.algorithm.settings.plan(prompts_per_step=1, sampling=sampling)


def partner_of(recipe: Recipe) -> str | None:
    """Hub id or folder of the language model that takes part in the plan and does not learn; None: there is none.

    Raises:
        ValueError: the algorithm's settings make no plan.
    """
    from llmac.core.protocols import NeedsPartner  # not light

    plan = plan_of(recipe)
    return (plan.partner_model or recipe.model.name) if isinstance(plan, NeedsPartner) else None
