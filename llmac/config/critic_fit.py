"""Whether a critic goes with the algorithm it is to serve, and with the engine it is to speak through."""

from collections.abc import Iterator

from llmac.config.cards import Choice
from llmac.config.schema import Recipe
from llmac.config.traits import learns, traits_of


def critic_that_does_not_fit(recipe: Recipe) -> Iterator[str]:
    """What the algorithm, the engine and the critic want of each other, and one of them cannot give."""
    name, card = recipe.algorithm.name, recipe.algorithm.settings
    critic, traits = recipe.critic, traits_of(recipe.critic)
    allocation = getattr(card, "allocation", "equal")  # cards differ
    if allocation != "equal" and not traits.says_prompt_values:
        yield (
            f"algorithm.allocation asks what prompts are worth, and critic {critic.name if critic else 'null'} does "
            "not say it; set critic: prompt_value or running_mean, or algorithm.allocation: equal"
        )
    if critic is None:
        return
    if (
        getattr(card, "uses_outcome_chances", False) and not traits.says_outcome_chances
    ):  # cards differ
        yield (
            f"{name} weighs tokens by how likely the outcome was after them, and critic {critic.name} has no classes "
            "of outcomes; set critic: code_outcomes or outcome_classes"
        )
    if not (traits.judges_states or getattr(card, "uses_outcome_chances", False)):  # cards differ
        yield (
            f"critic {critic.name} learns what whole responses came to, and {name} takes it at its word at single "
            "states; set critic: outcome_classes, or algorithm.name: coderl"
        )
    if card.plan_knows_values and not traits.repeats_the_plan:
        yield (
            f"critic {critic.name} would be asked for values that the trees of {name} know already; set critic: "
            "tree_mean, or choose an algorithm that asks at states, for example spo_chain"
        )
        return  # that it does not fit in other ways, too, would lead nowhere
    if traits.repeats_the_plan and not card.plan_knows_values:
        yield (
            f"critic {critic.name} says what the nodes of sampled trees are worth, and {name} samples no trees; choose "
            "another critic, for example monte_carlo, or algorithm.name: spo_tree"
        )
    if traits.engine is not None and traits.learns and not card.teaches_critic:
        yield (
            f"critic {critic.name} learns, and {name} does not teach it, so that its learner would hold memory for "
            "nothing; set critic.learns: false, or choose an algorithm that teaches, for example ppo"
        )
        return
    yield from _context_that_is_too_small(recipe, critic)
    by_targets = learns(critic) and not traits.says_prompt_values
    fresh = getattr(critic.settings, "init", None) in (None, "policy")  # cards differ
    told = getattr(card, "teach_critic", True) is False  # cards differ
    if by_targets and fresh and told:
        yield (
            f"algorithm.teach_critic is false, and critic {critic.name} starts knowing nothing, so that tokens would "
            "be weighed by noise; give critic.init the folder of a trained one, or leave algorithm.teach_critic at true"
        )
    elif by_targets and fresh and not card.teaches_critic and critic.name != card.default_critic:
        yield (
            f"critic {critic.name} learns, and {name} does not teach it, so that it would say the same everywhere; "
            f"give critic.init the folder of a trained one, or set critic: {card.default_critic}, or choose an "
            "algorithm that teaches, for example ppo or vineppo"
        )
    if card.group_size < traits.least_group_size:
        yield (
            f"critic {critic.name} compares siblings: algorithm.group_size must be at least {traits.least_group_size}, "
            f"found {card.group_size}"
        )
    if traits.least_group_size > 1 and not card.keeps_groups:
        yield (
            f"critic {critic.name} compares siblings, and {name} does not judge them in one step; choose another "
            "critic, or another algorithm"
        )
    if traits.reuse and not card.takes_offered_rows:
        yield (
            f"critic.reuse has continuations trained on beside the responses, and {name} cannot tell the two apart; "
            "set critic.reuse: false, or choose an algorithm that looks at one row at a time, for example vineppo"
        )
    truncation = getattr(card, "on_truncation", None)  # cards differ
    if traits.continuations and truncation == "bootstrap":
        yield (
            f"algorithm.on_truncation is bootstrap, and critic {critic.name} continues states, which the length limit "
            "leaves no room for: it says 0 there; set algorithm.on_truncation: terminal, or another critic"
        )


def _context_that_is_too_small(recipe: Recipe, critic: Choice) -> Iterator[str]:
    """A vLLM engine refuses requests that are longer than it was started for, in the middle of a run."""
    room, traits = recipe.rollout.max_model_len, traits_of(critic)
    if room is None or traits.engine is None:
        return
    # A critic that writes may say how long its prompts and what it writes can be.
    prompt = getattr(critic.settings, "max_prompt_tokens", None)
    new = getattr(critic.settings, "max_new_tokens", 0)
    if new >= room:
        yield (
            f"critic.max_new_tokens is {new}, and rollout.max_model_len leaves {room} tokens for a prompt and what "
            "the critic writes; raise rollout.max_model_len"
        )
    elif prompt is None or prompt + new > room:
        yield (
            f"critic.max_prompt_tokens must be at most {room - new}, found {'null' if prompt is None else prompt}: "
            f"rollout.max_model_len is {room}, and critic.max_new_tokens {new}"
        )
