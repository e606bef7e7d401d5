"""The half of a card that chooses where values are asked.

Segments of a fixed length, or begun where the policy was in doubt (SPO, arXiv:2505.23564), or ended
by a delimiter in the text (reasoning steps: VinePPO, arXiv:2410.01679).
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool
from torch import Tensor

from llmac.core.measures import Mean, Measure
from llmac.core.protocols import Decode
from llmac.core.segments import (
    after_ends,
    at_most,
    ends_in_doubt,
    every_n,
    every_token,
    low_probability,
    response_start,
    thinned_ends,
)
from llmac.core.text_segments import after_text, compile_delimiter
from llmac.core.types import Rollouts

from .base import Algorithm

Segmenter = Literal[
    "every_token", "every_n", "low_probability", "after_doubt", "delimiter", "response_start"
]
"""How a response is cut; `Segmented` says what each is."""


@dataclass(frozen=True, kw_only=True)
class Segmented(Algorithm):
    """The half that cuts a response into segments; a critic is asked at the start of each.

        every_token       before every sampled token: PPO
        every_n           every `segment_tokens` sampled tokens
        low_probability   before every `cut_interval`-th token that was in doubt: SPO
        after_doubt       after every token that was in doubt: GenAC
        delimiter         after each match of `delimiter` in the text: reasoning steps, VinePPO
        response_start    once: the response is one segment

    All tokens of a segment have the same advantage, and time (γ, λ) passes once a segment.
    """

    segmenter: Segmenter = "every_token"
    """Where values are asked, as above. every_token: PPO's paper, verl, TRL, OpenRLHF."""
    segment_tokens: int = 100
    """Sampled tokens a segment, if the segmenter is every_n; the last of a response may be shorter.
    100 in one of SPO's settings."""
    cut_below: float = 0.9
    """Probability below which a token was in doubt, if the segmenter is low_probability or
    after_doubt. .9 in SPO."""
    cut_interval: int = 5
    """A cut before every one of so many tokens in doubt. 5 in SPO, and 10 in its shorter runs."""
    delimiter: str = "newline"
    """What ends a segment, if the segmenter is delimiter: newline, paragraph, sentence, semicolon,
    or a regular expression looked for in the decoded text."""
    max_segments: int | None = None
    """Most segments of a response, the starts spread evenly among those found (after_doubt: the
    ends); None: no bound."""

    def __post_init__(self) -> None:
        """Refuse segments that cannot be cut, and keys that nothing would read."""
        super().__post_init__()
        most = self.max_segments
        self._require("segment_tokens", self.segment_tokens >= 1, "at least 1")
        self._require("cut_below", 0 < self.cut_below <= 1, "in (0, 1]")
        self._require("cut_interval", self.cut_interval >= 1, "at least 1")
        self._require("max_segments", most is None or most >= 1, "None, or at least 1")
        try:
            compile_delimiter(self.delimiter)
        except ValueError as error:
            raise ValueError(f"delimiter of {type(self).__name__}: {error}") from None
        for name, segmenters in (
            ("segment_tokens", ("every_n",)),
            ("cut_below", ("low_probability", "after_doubt")),
            ("cut_interval", ("low_probability",)),
            ("delimiter", ("delimiter",)),
        ):
            self._without_effect(
                name,
                self.segmenter not in segmenters,
                f"set segmenter to {' or '.join(segmenters)}",
            )
        self._without_effect(
            "max_segments", self.segmenter == "response_start", "choose another segmenter"
        )

    @property
    def reads_text(self) -> bool:
        """Whether a delimiter is looked for."""
        return self.segmenter == "delimiter"

    @property
    def asks_first(self) -> bool:
        """Whether the first sampled token begins a segment though it was not in doubt."""
        return True

    def segments(self, rollouts: Rollouts, *, decode: Decode | None = None) -> Bool[Tensor, "B T"]:
        """Where V is asked: at the start of every segment.

        Raises:
            ValueError: a delimiter is to be found in text, and there is no `decode`.
        """
        starts = self._cut(rollouts, decode)
        return starts if self.max_segments is None else at_most(starts, self.max_segments)

    def _cut(self, rollouts: Rollouts, decode: Decode | None) -> Tensor:
        mask = rollouts.action_mask
        match self.segmenter:
            case "every_token":
                return every_token(mask)
            case "every_n":
                return every_n(mask, self.segment_tokens)
            case "response_start":
                return response_start(mask)
            case "low_probability":
                return low_probability(
                    rollouts.old_logprobs,
                    mask,
                    threshold=self.cut_below,
                    interval=self.cut_interval,
                    first=self.asks_first,
                )
            case "after_doubt":
                ends = ends_in_doubt(rollouts.old_logprobs, mask, threshold=self.cut_below)
                if self.max_segments is not None:
                    ends = thinned_ends(ends, self.max_segments)
                return after_ends(ends, mask)
            case "delimiter":
                if decode is None:
                    raise ValueError(
                        f"{type(self).__name__} cuts responses after {self.delimiter!r}, which is "
                        "looked for in text, and got no decode to read it with; pass decode=, as "
                        "for every card with reads_text, or choose another segmenter"
                    )
                pattern = compile_delimiter(self.delimiter)
                responses = [t.response_ids for t in rollouts.trajectories]
                return after_text(responses, mask, pattern, decode)


def segment_metrics(rollouts: Rollouts, starts: Bool[Tensor, "B T"]) -> dict[str, Measure]:
    """Segments a response, and the share of responses that were not cut.

    Rows whose ends were valued elsewhere (`Trajectory.value_span`) were not for us to cut, and do
    not count.
    """
    count = starts[[t.value_span is None for t in rollouts.trajectories]].sum(dim=1)
    return {
        "rollout/segments": Mean(count.sum(), float(len(count))),
        "rollout/uncut_responses": Mean((count <= 1).sum(), float(len(count))),
    }
