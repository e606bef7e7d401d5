"""The language models of a run besides the policy: a critic that writes, and a partner that does not learn."""

from llmac.config.schema import Recipe
from llmac.config.traits import partner_of, traits_of
from llmac.data.tokenizing import encoder
from llmac.models.alike import check_alike
from llmac.models.loading import ModelSpec, load_tokenizer
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
        ConfigError: a tokenizer is missing, a critic's weights do not go into the policy's engine, or what it reads
            and writes has no room.
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
        load_tokenizer(partner)
        found.append(f"{partner.name} takes part and does not learn")
    return "; ".join(found)
