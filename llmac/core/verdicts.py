"""What a critique says of an answer in the end: right or wrong, or a score.

A critique is text that is rewarded by what this file reads in it, so nothing is read that a writer
could mean either way.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

EMPHASIS = ".,;:!*_`'\"()[]{}"
"""Stripped from both ends of a word before it is compared."""


@runtime_checkable
class Verdicts(Protocol):
    """Reads verdicts, and says how true they are."""

    def read(self, critique: str) -> bool | float | None:
        """The verdict; None: there is none, or it cannot be told which."""
        ...

    def agreement(self, verdict: bool | float | None, *, reward: float, right: bool) -> float:
        """How true it is, 0 ... 1, of an answer with this reward; 0 without a verdict."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictLine:
    """A line that says whether the answer is right, such as `Correctness of the final answer: Wrong`.

        r_dis = 1[verdict = truth]

    Critique-RL, arXiv:2510.24320. Deviation: the authors' code looks for the line that would be
    right, anywhere, so that a critique with both lines is always paid. Here a critique that says
    both has said nothing.
    """

    marker: str = "Correctness of the final answer:"
    """What comes before the verdict."""
    right: str = "Correct"
    """The verdict on a right answer; upper and lower case are alike."""
    wrong: str = "Wrong"
    """The verdict on a wrong one."""

    def __post_init__(self) -> None:
        """Refuse words that cannot be found or told apart."""
        if not self.marker.strip():
            raise ValueError("the marker of a verdict is empty; give the words that introduce it")
        for name, word in (("right", self.right), ("wrong", self.wrong)):
            if len(word.split()) != 1:
                raise ValueError(f"the verdict on a {name} answer is one word; found {word!r}")
        if _bare(self.right) == _bare(self.wrong):
            raise ValueError(
                f"the verdicts on right and wrong answers are both {self.right!r}; they must differ"
            )

    def read(self, critique: str) -> bool | None:
        r"""Whether the critique calls the answer right; None: no verdict, or both.

        The word behind the last marker counts, if it is one of the two, if the other one is not on
        the same line, and if no earlier marker is followed by the other one. Punctuation alone is
        no word, unless it is one of the two.

        >>> line = VerdictLine()
        >>> line.read("Step 2 is off.\n**Correctness of the final answer:** Wrong, it is 4.")
        False
        >>> line.read("Correctness of the final answer: Correct or Wrong") is None
        True
        """
        said = [self._behind(text) for text in _behind_markers(critique, self.marker)]
        contradicted = True in said and False in said
        return None if not said or contradicted else said[-1]

    def agreement(self, verdict: bool | float | None, *, reward: float, right: bool) -> float:
        """1 where the verdict is what the answer is, else 0."""
        return float(verdict is not None and bool(verdict) == right)

    def _behind(self, line: str) -> bool | None:
        right, wrong = _bare(self.right), _bare(self.wrong)
        said = [_bare(word) for word in line.split()]
        words = [w for w in said if w in (right, wrong) or any(map(str.isalnum, w))]
        if not words or words[0] not in (right, wrong) or {right, wrong} <= set(words):
            return None
        return words[0] == right


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLine:
    """A line that gives the answer a score from 1 to 10: for answers that are more or less good.

        oracle = 1 + 9 · (reward - low) / (high - low)      r_dis = max(0, 1 - |score - oracle| / tolerance)

    Critique-RL, arXiv:2510.24320, appendix E.
    """

    marker: str = "Score:"
    """What comes before the score."""
    tolerance: float = 3.0
    """δ: a score that is so far off earns nothing. The paper gives no value; this one is ours."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Rewards of the worst answer and of the best: 1 and 10 on the scale."""

    def __post_init__(self) -> None:
        """Refuse a scale without extent."""
        if not self.marker.strip():
            raise ValueError("the marker of a score is empty; give the words that introduce it")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance is finite and above 0; found {self.tolerance}")
        low, high = self.reward_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                f"reward_range is (worst, best), finite and ascending; found {self.reward_range}"
            )

    def read(self, critique: str) -> float | None:
        r"""The score; None: there is none, it is outside 1 ... 10, or two differ.

        >>> ScoreLine().read("Fine.\nScore: 7/10"), ScoreLine().read("Score: 11")
        (7.0, None)
        """
        said = {_number(text) for text in _behind_markers(critique, self.marker)}
        if len(said) != 1:
            return None
        [score] = said
        return score if score is not None and 1 <= score <= 10 else None

    def agreement(self, verdict: bool | float | None, *, reward: float, right: bool) -> float:
        """1 for the score that the reward is worth, less in proportion to the distance."""
        if verdict is None:
            return 0.0
        low, high = self.reward_range
        oracle = 1 + 9 * (reward - low) / (high - low)
        return score_agreement(float(verdict), oracle, tolerance=self.tolerance)


VerdictKind = Literal["correctness", "score"]
"""`VerdictLine` or `ScoreLine`."""


def score_agreement(score: float, oracle: float, *, tolerance: float) -> float:
    """How near a score is to the right one.

        max(0, 1 - |score - oracle| / tolerance)

    Critique-RL, arXiv:2510.24320, appendix E.

    >>> round(score_agreement(7.0, 6.0, tolerance=3.0), 5), score_agreement(2.0, 6.0, tolerance=3.0)
    (0.66667, 0.0)
    """
    return max(0.0, 1 - abs(score - oracle) / tolerance)


def _behind_markers(text: str, marker: str) -> list[str]:
    """What follows each marker, up to the next one or the end of the line."""
    pieces = re.split(re.escape(marker), text, flags=re.IGNORECASE)[1:]
    return [(piece.splitlines() or [""])[0] for piece in pieces]


def _bare(word: str) -> str:
    """In lower case and without punctuation, unless it is nothing else."""
    return (word.strip(EMPHASIS) or word).casefold()


def _number(text: str) -> float | None:
    found = re.match(r"[\s*_`(\[]*(\d+(?:\.\d+)?)(?![\d.]*\d)", text)
    return float(found[1]) if found else None
