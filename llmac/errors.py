"""Errors a user can act on. Each also inherits the standard-library error it refines.

    LlmacError
    ├── ConfigError (ValueError)      a recipe or argument is wrong: field, owner, finding, way out
    ├── DataError (ValueError)        a dataset cannot be read or lacks a column
    ├── RewardError (RuntimeError)    a reward function raised or returned something that is not a reward
    ├── EngineError (RuntimeError)    a rollout engine failed or holds weights that are not the policy's
    ├── CheckpointError (RuntimeError) a checkpoint is missing, incomplete or of another configuration
    ├── ConsistencyError (RuntimeError) an invariant of training does not hold; going on would be silently wrong
    └── StalledError (TimeoutError)   nothing moved for longer than allowed; names rank and phase
"""


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
