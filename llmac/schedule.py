"""In which steps the policy learns: after a warm-up of the critic, and then every so many steps."""

import logging
from dataclasses import dataclass
from typing import Any

from llmac.core.measures import Metrics
from llmac.errors import ConfigError

logger = logging.getLogger(__name__)

EXPLAINED = "critic/vf_explained_var"


@dataclass(kw_only=True)
class PolicySchedule:
    """Says whether the policy moves in a step; the critic always learns.

    The warm-up lasts `warmup_steps`, and with `warmup_explained` also until the critic's explained variance of a step
    has reached that (value pre-training, VC-PPO, arXiv:2503.01491). After it the policy moves every `every` steps
    (delayed policy updates, TD3, arXiv:1802.09477).

    >>> schedule = PolicySchedule(warmup_steps=1, every=2)
    >>> [schedule.moves(step, {}) for step in (1, 2, 3, 4, 5)]
    [False, False, True, False, True]
    """

    warmup_steps: int = 0
    warmup_explained: float | None = None
    every: int = 1
    warm_since: int | None = None
    """Last step of the warm-up; None: it goes on."""

    def moves(self, step: int, metrics: Metrics) -> bool:
        """Whether the policy learns in `step`. Steps are asked for in order, each once.

        Args:
            step: from 1.
            metrics: of the step's credit, equal on all ranks.

        Raises:
            ConfigError: the warm-up waits for an explained variance that the algorithm does not report.
        """
        if self.warm_since is None:
            if step <= self.warmup_steps:
                return False
            if not self._explains_enough(metrics):
                return False
            if self.warmup_explained is not None:
                logger.info("step %d: the critic is warm, the policy learns", step)
            self.warm_since = self.warmup_steps if self.warmup_explained is None else step - 1
        return (step - self.warm_since) % self.every == 0

    def state(self) -> dict[str, Any]:
        """When the warm-up ended."""
        return {"warm_since": self.warm_since}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.warm_since = state["warm_since"]

    def _explains_enough(self, metrics: Metrics) -> bool:
        if self.warmup_explained is None:
            return True
        if EXPLAINED not in metrics:
            raise ConfigError(
                f"run.critic_warmup_explained waits for {EXPLAINED}, which this algorithm does not report; remove it, "
                "or set run.critic_warmup_steps"
            )
        return float(metrics[EXPLAINED].value) >= self.warmup_explained
