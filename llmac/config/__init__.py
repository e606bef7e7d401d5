"""Configuration room: a recipe in YAML, checked as a whole before anything heavy is loaded.

    schema.py    what a recipe may say, one model per owner
    cards.py     the sections whose keys are a dataclass's fields: algorithm, critic
    loading.py   YAML and overrides to a `Recipe`, or one error
    effects.py   keys without effect, contradictions
    surroundings.py   files, folders and functions a recipe names
    show.py      a recipe as text, and its fingerprint
    words.py, familiar.py, guards.py   what messages are made of

Read `schema.py` first. To add a key: a field with its docstring there (or in a card), a test in which it changes
something, and `python tests/config/test_surface.py`. Imports pydantic and PyYAML; cards are imported at use.
"""

from llmac.config.cards import Choice
from llmac.config.loading import load_recipe
from llmac.config.other_run import differences
from llmac.config.schema import (
    ActorConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    RewardConfig,
    RewardFunctionConfig,
    RolloutConfig,
    RunConfig,
)
from llmac.config.show import dump, fingerprint, plain, show
from llmac.config.surroundings import verify

__all__ = [
    "ActorConfig",
    "Choice",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "Recipe",
    "RewardConfig",
    "RewardFunctionConfig",
    "RolloutConfig",
    "RunConfig",
    "differences",
    "dump",
    "fingerprint",
    "load_recipe",
    "plain",
    "show",
    "verify",
]
