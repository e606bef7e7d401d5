"""When an engine may sample: its weights are complete and its memory is there.

Sleeping and updating meet here, because both take weights away: level 2 discards them, and an update that breaks off
leaves a mixture of two policies. Knows no engine, so that its rules are tested without a GPU.
"""

from typing import Literal, Protocol

from llmac.errors import EngineError

SleepLevel = Literal[0, 1, 2]
"""What `sleep` frees: 0 nothing, 1 keys and values, weights move to main memory, 2 both are discarded."""


class Memory(Protocol):
    """Accelerator memory that can be given back for a while, in two parts: "weights" and "kv_cache"."""

    def sleep(self, level: int) -> object:
        """Give back what is still held: weights are moved away (1) or discarded (2), keys and values discarded."""
        ...

    def wake_up(self, tags: list[str]) -> object:
        """Take the named parts again; what was moved away is moved back, what was discarded is undefined."""
        ...


class Readiness:
    """States of an engine's weights and memory, and the only order in which they change.

        sleep            gives memory back; at level 2 the weights are gone
        begin_update     weights become incomplete, their memory is there
        finish_update    weights are complete; keys and values need not be there yet
        wake             everything is there, ready to sample; refused while weights are incomplete

    Keys and values come back in `wake` only, so that an update never holds them, the trainer's gathered weights and
    the engine's weights at one time.

    >>> class Unlimited:
    ...     def sleep(self, level): print("sleep", level)
    ...     def wake_up(self, tags): print("wake", *tags)
    >>> readiness = Readiness(Unlimited(), level=2)
    >>> readiness.sleep()
    sleep 2
    >>> readiness.refusal
    'its weights were discarded while it slept (rollout.sleep_level 2)'
    >>> readiness.begin_update(version=7)
    wake weights
    >>> readiness.finish_update()
    >>> readiness.wake()
    wake kv_cache
    """

    def __init__(self, memory: Memory, level: SleepLevel) -> None:
        """Start awake, with complete weights."""
        self.level: SleepLevel = level
        self._memory = memory
        self._weights_there = True
        self._kv_cache_there = True
        self._updating = False
        self._refusal: str | None = None

    @property
    def updating(self) -> bool:
        """Whether an update began and did not finish."""
        return self._updating

    @property
    def refusal(self) -> str | None:
        """Why the weights are not complete; None: they are."""
        return self._refusal

    def sleep(self) -> None:
        """Give memory back. Does nothing at level 0 or when asleep already."""
        if self.level == 0 or not self._weights_there:
            return
        self._memory.sleep(self.level)
        self._weights_there = self._kv_cache_there = False
        if self.level == 2:
            self._refusal = "its weights were discarded while it slept (rollout.sleep_level 2)"

    def begin_update(self, version: int) -> None:
        """Make room for weights; from here to `finish_update` they are neither old nor new."""
        self._updating = True
        self._refusal = f"the update to version {version} did not complete"
        if not self._weights_there:
            self._memory.wake_up(["weights"])
            self._weights_there = True

    def finish_update(self) -> None:
        """All weights have arrived."""
        self._updating = False
        self._refusal = None

    def wake(self) -> None:
        """Undo `sleep`, ready to sample.

        Raises:
            EngineError: the weights are not complete.
        """
        self.check()
        parts = [("weights", self._weights_there), ("kv_cache", self._kv_cache_there)]
        for part, there in parts:
            if not there:
                self._memory.wake_up([part])
        self._weights_there = self._kv_cache_there = True

    def check(self) -> None:
        """Raise unless the weights are complete, whether the memory is there or not."""
        if self._refusal is not None:
            raise EngineError(
                f"the vLLM engine holds incomplete weights: {self._refusal}. Call load_weights with the complete "
                "weights before sampling"
            )
