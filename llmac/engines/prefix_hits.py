"""How much of the prompts an engine did not have to compute, because it had their beginnings already."""

from llmac.core.measures import Mean, Metrics


class PrefixHits:
    """Prompt tokens asked for and not computed, counted once for each response, until they are drained."""

    def __init__(self) -> None:
        """Nothing counted yet."""
        self._asked = self._reused = 0

    def add(self, *, asked: int, reused: int) -> None:
        """Count a request.

        Args:
            asked: prompt tokens, times the responses to it.
            reused: those among them whose keys and values were there already.
        """
        self._asked += asked
        self._reused += reused

    def drain(self) -> Metrics:
        """The fraction reused since the last call; nothing where nothing was asked for.

        >>> hits = PrefixHits()
        >>> hits.add(asked=40, reused=30)
        >>> hits.drain()["rollout/prefix_hit_rate"].value, hits.drain()
        (0.75, {})
        """
        asked, reused = self._asked, self._reused
        self._asked = self._reused = 0
        return {"rollout/prefix_hit_rate": Mean(float(reused), float(asked))} if asked else {}
