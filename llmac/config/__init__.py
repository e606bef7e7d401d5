"""Configuration room: a recipe in YAML, checked as a whole before anything heavy is loaded.

`schema.py`   what a recipe may say, one model per owner        `cards.py`    algorithm and critic
sections
`loading.py`  YAML and overrides to a `Recipe`, or one error    `effects.py`  keys without effect,
contradictions
`show.py`     a recipe as text, and its fingerprint             `surroundings.py`  files, folders,
functions it names
`words.py`    types and near misses in words                    `familiar.py` names from other
libraries

Read `schema.py` first. To add a key: a field with its docstring there (or in a card), a test in
which it changes
something, and a line in `tests/config/schema_snapshot.json`. Imports pydantic and PyYAML; cards are
imported at use.
"""

from llmac.config.cards import Choice
from llmac.config.loading import load_recipe
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
    "dump",
    "fingerprint",
    "load_recipe",
    "plain",
    "show",
    "verify",
]
