"""The language models of a run besides the policy: a critic that writes, and a partner that does not learn."""

from llmac.config.schema import Recipe
from llmac.config.traits import partner_of, plan_of, traits_of
from llmac.core.critique import Critique
from llmac.data.tokenizing import encoder
from llmac.errors import ConfigError
from llmac.models.alike import check_alike
from llmac.models.loading import ModelSpec, context_length, load_tokenizer
from llmac.new_actor import model_named


def critic_model(recipe: Recipe) -> ModelSpec | None:
    """That of a critic that writes, in the settings of the recipe; None: the critic does not write."""
    if recipe.critic is None or traits_of(recipe.critic).engine is None:
        return None
    init = recipe.critic.settings.init
    return model_named(recipe.model, recipe.model.name if init == "policy" else init)


def partner_model(recipe: Recipe) -> ModelSpec | None:
    """That of the player that does not learn; None: nobody plays with the policy."""
    name = partner_of(recipe)
    return None if name is None else model_named(recipe.model, name)


def check_second_models(recipe: Recipe) -> str:
    """Refuse what the second models of a run cannot be, from their configurations and tokenizers.

    Raises:
        ConfigError: a tokenizer or its chat template is missing, a critic's weights do not go into the policy's
            engine, or what it or a player reads and writes has no room.
    """
    found: list[str] = []
    critic, partner = critic_model(recipe), partner_model(recipe)
    if critic is not None and traits_of(recipe.critic).engine == "shared":
        found.append(check_alike(recipe.model, critic))
    elif critic is not None:
        found.append(f"{critic.name} criticises in an engine of its own")
    if critic is not None:
        assert recipe.critic is not None, "it has a model"
        recipe.critic.settings.check_room(critic, recipe.model, encoder(load_tokenizer(critic)))
    if partner is not None:
        _check_players(recipe, partner)
        found.append(f"{partner.name} takes part and does not learn")
    return "; ".join(found)


def _check_players(recipe: Recipe, partner: ModelSpec) -> None:
    """Two that speak to each other can be spoken to as the plan does, and have room for what they may say at most."""
    policy, other = ((spec, load_tokenizer(spec)) for spec in (recipe.model, partner))
    plan = plan_of(recipe)
    if not isinstance(plan, Critique):
        return
    words = plan.wording
    for spec, tokenizer in (policy, other):
        if words.chat and tokenizer.chat_template is None:
            raise ConfigError(
                f"algorithm.chat is true, and the tokenizer of {spec.name} has no chat template; set algorithm.chat: "
                "false, or take an instruction-tuned model"
            )
    trains_critic = plan.trains == "critic"
    actor, critic = (other, policy) if trains_critic else (policy, other)
    said = plan.answers.max_new_tokens + plan.critiques.max_new_tokens
    rooms = [
        ("an answer", actor, "", plan.answers.max_new_tokens),
        ("an answer and a critique of it", critic, words.to_criticise("", ""), said),
    ]
    if plan.refinements is not None:
        most = said + plan.refinements.max_new_tokens
        rooms.append(
            ("a refinement, and what it follows,", actor, words.to_refine("", "", ""), most)
        )
    own = ["critique_tokens"]
    if trains_critic:
        own = ["answer_tokens"] if plan.refinements is None else ["answer_tokens", "refine_tokens"]
    for what, (spec, tokenizer), template, most in rooms:
        asked = len(encoder(tokenizer)(template)) if template else 0
        limits = (context_length(spec), recipe.rollout.max_model_len)
        room = min((limit for limit in limits if limit is not None), default=None)
        if room is not None and asked + most >= room:
            raise ConfigError(
                f"{what} may take {asked + most} tokens with the words around, {spec.name} has room for {room}, and "
                "a question needs some; lower "
                f"{', '.join(f'algorithm.{name}' for name in own)} or rollout.max_new_tokens"
            )
