"""llmac trains language models by reinforcement learning with value models.

`llmac.train(model=..., algorithm="ppo", reward=my_reward, dataset=rows)` from Python,
`accelerate launch recipes/train.py recipes/<name>.yaml key.sub=value ...` from a shell.
Importing this package is light: torch and everything heavier are imported at first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmac.api import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def __getattr__(name: str) -> Any:  # PEP 562: the API is loaded at first use
    if name == "train":
        from llmac.api import train

        return train
    raise AttributeError(f"module 'llmac' has no attribute {name!r}")
