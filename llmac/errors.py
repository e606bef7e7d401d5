"""Errors a user can act on. Each also inherits the standard-library error it refines.

    LlmacError
    ├── ConfigError (ValueError)      a recipe or argument is wrong: field, owner, finding, way out
    ├── DataError (ValueError)        a dataset cannot be read or lacks a column
    ├── RewardError (RuntimeError)    a reward function raised or returned something that is not a reward
    ├── EngineError (RuntimeError)    a rollout engine failed or holds weights that are not the policy's
    ├── CheckpointError (RuntimeError) a checkpoint is missing, incomplete or of another configuration
    ├── ConsistencyError (RuntimeError) an invariant of training does not hold; going on would be silently wrong
    └── StalledError (TimeoutError)   nothing moved for longer than allowed; names rank and phase

`did_you_mean` ends a message about an unknown name.
"""

import difflib
from collections.abc import Sequence


class LlmacError(Exception):
    """Base of all errors raised on purpose by llmac."""


class ConfigError(LlmacError, ValueError):
    """A recipe or an argument is wrong."""


class DataError(LlmacError, ValueError):
    """A dataset cannot be read, is empty, or lacks a column."""


class RewardError(LlmacError, RuntimeError):
    """A reward function raised, or returned something that is not a reward."""


class EngineError(LlmacError, RuntimeError):
    """A rollout engine failed, or its weights are not the policy's."""


class CheckpointError(LlmacError, RuntimeError):
    """A checkpoint is missing, incomplete, or of another configuration."""


class ConsistencyError(LlmacError, RuntimeError):
    """An invariant of training does not hold; continuing would be silently wrong."""


class StalledError(LlmacError, TimeoutError):
    """Nothing moved for longer than allowed."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the closest known one, then all of them.

    >>> did_you_mean("anwser", ["answer", "question"])
    " Did you mean 'answer'? There are: answer, question."
    >>> did_you_mean("x", [])
    ''
    """
    if not known:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return (f" Did you mean {close[0]!r}?" if close else "") + f" There are: {listed}."
