"""The scalar head: learns the mean return by (clipped) squared or Huber error."""

from dataclasses import dataclass
from typing import Literal

from llmac.core.value_heads import Scalar
from llmac.critics.head_config import HeadConfig
from llmac.critics.refusals import refuse_unless


@dataclass(frozen=True, kw_only=True)
class ValueHeadConfig(HeadConfig):
    """A language model with a scalar head that learns returns by (clipped) squared error."""

    loss: Literal["mse", "huber"] = "mse"
    """Half the squared error, or Huber's: linear beyond `huber_delta` (SAFE)."""
    huber_delta: float = 0.5
    """Where Huber's error becomes linear (SAFE: 0.5): unit of reward, or of `normalize`."""
    value_clip: float | None = 0.2
    """How far a value may move from the one at collection before its loss is clipped, as a fraction of the width of
    `reward_range`; None = no clipping. The peers' fixed 0.2 and 0.5 (TRL, verl) are this only for rewards in [0, 1]."""
    clip_combine: Literal["max", "mean"] = "max"
    """The larger of the two errors, clipped and not (PPO), or their average (SAFE)."""
    bounded: bool = False
    """Bend values into `reward_range` by an arc tangent; returns outside count as its ends."""
    ensemble_loss: Literal["each", "combined"] = "each"
    """With several heads: each learns by itself, or all by the one value they make together (SAFE)."""
    normalize: Literal["none", "running", "popart"] = "none"
    """Learn returns minus their running mean, divided by their running deviation; values stay in units of reward.
    `popart` rewrites the last layer so that no value changes when the statistics do; needs whole weights."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        refuse_unless(
            self.value_clip is None or self.value_clip > 0,
            f"value_clip must be positive or null (no clipping), found {self.value_clip}",
        )
        refuse_unless(
            self.huber_delta > 0, f"huber_delta must be positive, found {self.huber_delta}"
        )
        refuse_unless(
            not (self.bounded and self.normalize != "none"),
            f"bounded values need no normalize: {self.normalize}; take one of the two",
        )

    @property
    def clip(self) -> float | None:
        """The clip in units of reward."""
        low, high = self.reward_range
        return None if self.value_clip is None else self.value_clip * (high - low)

    @property
    def normalization(self) -> Literal["none", "running", "popart"]:
        """As set."""
        return self.normalize

    @property
    def learns_together(self) -> bool:
        """As set."""
        return self.heads > 1 and self.ensemble_loss == "combined"

    def head(self) -> Scalar:
        """The mean return."""
        return Scalar(
            loss=self.loss,
            huber_delta=self.huber_delta,
            # Only the value of all heads together is known from collection.
            clip=self.clip if self.heads == 1 or self.learns_together else None,
            clip_combine=self.clip_combine,
            bounds=self.reward_range if self.bounded else None,
        )

    def without_effect(self) -> dict[str, str]:
        """Fields that do nothing as they are set, with the reason."""
        idle = super().without_effect()
        if self.loss == "mse":
            idle["huber_delta"] = "it belongs to loss: huber"
        if self.heads == 1:
            idle["ensemble_loss"] = "there is one head; set heads: 2"
        elif not self.learns_together:
            reason = "only the value of all heads together is known from collection; set ensemble_loss: combined"
            idle |= {"value_clip": reason, "clip_combine": reason}
        if self.value_clip is None:
            idle["clip_combine"] = "there is no clipping; set value_clip"
        return idle
