"""The engine a generative critic speaks through: its own, or the policy's for as long as values are asked."""

from collections.abc import Callable, Sequence
from typing import Any

from llmac.core.measures import Measure
from llmac.core.protocols import Completion, CountsPrefixHits, Request, RolloutEngine
from llmac.critics.bench import TrainedPolicy
from llmac.errors import ConsistencyError

CheckEngine = Callable[..., Any]
"""`llmac.engines.probe.check_engine_holds` with the run's tolerance."""


class CriticEngine:
    """An engine that has the critic's weights when it is asked.

    Its own engine gets them when they have changed often enough since the last time. The policy's engine has the
    policy's weights at that moment and gets the critic's every time; it keeps them until the loop synchronizes it at
    the end of the step, and until then it reports a negative `policy_version`, -1 minus the number of the critic's
    updates, so that a response sampled meanwhile could not pass for the policy's.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: TrainedPolicy | None,
        *,
        shared: bool,
        every: int,
        check: CheckEngine | None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            engine: the critic's own or the policy's.
            policy: who learns; None: the engine was built with weights that stay.
            shared: whether it is the policy's engine.
            every: updates after which an own engine gets new weights.
            check: proves, the first time, that the engine has what it was sent; None: nobody asks.
        """
        self._engine, self._policy = engine, policy
        self._shared, self._every, self._check = shared, every, check
        self._held: int | None = None
        self._metrics: dict[str, Measure] = {}

    @property
    def held(self) -> int:
        """Updates that the weights in the engine have seen; 0 before any are sent."""
        return self._held or 0

    def forget(self) -> None:
        """Other weights were loaded into the learner: whatever was sent is out of date."""
        self._held = None

    def bring(self, updates: int, probe: Sequence[int]) -> None:
        """See to it that the engine has the critic's weights. Collective.

        Args:
            updates: of the critic so far.
            probe: a few tokens to continue, for the proof.

        Raises:
            EngineError: the weights do not fit the engine, or it does not sample from them.
            ConsistencyError: it reports another version than it was given.
        """
        if self._policy is None:
            return
        if not self._shared and self._held is not None and updates - self._held < self._every:
            return
        version = -1 - updates if self._shared else updates
        self._engine.load_weights(self._policy.weights(), version)
        if self._engine.policy_version != version:
            raise ConsistencyError(
                f"the critic's engine reports weights of version {self._engine.policy_version} after it was given "
                f"version {version}"
            )
        if self._held is None and self._check is not None:
            self._check(
                self._engine,
                self._policy.logprobs_of,
                [tuple(probe)],
                when="the critic's engine, at its first use",
            )
        self._held = updates

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Ask; every rank, also with nothing to ask."""
        engine = self._engine
        # What the policy's engine has counted so far is the policy's; the loop would take it for ours.
        before = engine.prefix_hits() if isinstance(engine, CountsPrefixHits) else {}
        completions = engine.generate(requests)
        if isinstance(engine, CountsPrefixHits):
            for rate in engine.prefix_hits().values():
                self._metrics["critic/prefix_hit_rate"] = rate
            if self._shared:
                self._metrics |= before
        return completions

    def metrics(self) -> dict[str, Measure]:
        """How much of the prompts the engine did not have to read, where it knows."""
        metrics, self._metrics = self._metrics, {}
        return metrics
