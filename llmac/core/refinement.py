"""What a critique is worth, told from the answer before it and the answers after it. Pure numbers and text."""

import re
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

RefineReward = Literal["refine", "delta", "correction"]
Form = Literal["additive", "gated"]
RepairMode = Literal["abs", "diff", "diff_or_exact"]

KEPT_RIGHT = 0.2
"""r_correction of an answer that was right and still is; also what a gated reward pays for a true verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A critique's answer, and what became of it."""

    before: float
    """Reward of the answer."""
    before_right: bool
    after: tuple[float, ...] = ()
    """Rewards of the refined answers; none where nobody was asked for any."""
    after_right: tuple[bool, ...] = ()
    agreement: float = 0.0
    """r_dis: how true the verdict is, 0 ... 1."""


@runtime_checkable
class Judge(Protocol):
    """Says what a critique is worth."""

    def worth(self, outcome: Outcome) -> float:
        """The reward of one critique."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReward:
    """The reward of Critique-RL (arXiv:2510.24320), of either stage and in either form.

        stage 1    additive: r_dis                          gated: 1 if r_dis = 1, else -1
        stage 2    additive: r_refine + beta1 · r_dis       gated: r_refine + .2 if r_dis = 1, else -1

    additive is the paper's, gated what the authors' code does. r_refine is `refine_gain`, averaged
    over the refinements.
    """

    stage: Literal[1, 2]
    form: Form = "additive"
    refine_reward: RefineReward = "refine"
    beta1: float = 0.2
    """The paper's main text and code; its appendix prints another number, taken for Adam's beta."""
    binary: bool = True
    """Whether answers count as right or wrong; else by their rewards (open-ended tasks)."""

    def worth(self, outcome: Outcome) -> float:
        """The reward of one critique.

        Raises:
            ValueError: stage 2, and nothing was refined.
        """
        true = outcome.agreement >= 1
        if self.stage == 1:
            if self.form == "additive":
                return outcome.agreement
            return 1.0 if true else -1.0
        gain = self._gain(outcome)
        if self.form == "additive":
            return gain + self.beta1 * outcome.agreement
        return gain + KEPT_RIGHT if true else -1.0

    def _gain(self, outcome: Outcome) -> float:
        after = [float(right) for right in outcome.after_right] if self.binary else outcome.after
        before = float(outcome.before_right) if self.binary else outcome.before
        if not after:
            raise ValueError("stage 2 rewards refined answers, and there is none")
        return sum(refine_gain(before, one, self.refine_reward) for one in after) / len(after)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReward:
    """The reward of RL4F (arXiv:2305.08844): how good the repaired answer is, or how much better.

        abs            S(y')
        diff           d = S(y') - S(y)
        diff_or_exact  max(d, 1[y' exact]) where d >= 0, else d

    S is the task's reward, `exact` a reward of at least what counts as solved; averaged over the
    refinements.
    """

    mode: RepairMode = "abs"

    def worth(self, outcome: Outcome) -> float:
        """The reward of one critique.

        Raises:
            ValueError: nothing was refined.
        """
        if not outcome.after:
            raise ValueError("a repair is rewarded, and there is no refined answer")
        pairs = zip(outcome.after, outcome.after_right, strict=True)
        gains = [repair_gain(outcome.before, s, self.mode, exact=exact) for s, exact in pairs]
        return sum(gains) / len(gains)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftFilter:
    """1 for critiques that help often enough, 0 for others: AutoMathCritique's Monte-Carlo filter.

        keep a critique of a wrong answer where  mean_k 1[y'_k right] >= tau
                      of a right one       where  mean_k 1[y'_k right] >= 1 - tau

    The mean is a Monte-Carlo estimate of V(x, y, c). arXiv:2411.16579 has the first line; the
    second is ours.
    """

    tau: float = 0.3
    """Least share of right refinements. The paper's value is not known to us for certain."""

    def worth(self, outcome: Outcome) -> float:
        """Whether to keep one critique.

        >>> wrong = Outcome(before=0.0, before_right=False, after=(1.0, 0.0), after_right=(True, False))
        >>> SoftFilter(tau=0.3).worth(wrong), SoftFilter(tau=0.6).worth(wrong)
        (1.0, 0.0)
        """
        if not outcome.after_right:
            raise ValueError("a critique is judged by refined answers, and there is none")
        share = sum(outcome.after_right) / len(outcome.after_right)
        least = 1 - self.tau if outcome.before_right else self.tau
        return float(share >= least - 1e-9)  # 3 of 10 are .3


def refine_gain(before: float, after: float, mode: RefineReward) -> float:
    """What a refinement is worth; rewards 0 = wrong, 1 = right, or on any scale but for `correction`.

        refine      o'
        delta       o' - o
        correction  1 if o = 0 and o' = 1;  .2 if o = o' = 1;  0 if o' = 0

    Critique-RL, arXiv:2510.24320.

    >>> refine_gain(1.0, 0.0, "delta"), refine_gain(0.0, 1.0, "correction")
    (-1.0, 1.0)
    """
    if mode == "refine":
        return after
    if mode == "delta":
        return after - before
    return 0.0 if not after else KEPT_RIGHT if before else 1.0


def repair_gain(before: float, after: float, mode: RepairMode, *, exact: bool) -> float:
    """What a repair is worth: `RepairReward` has the formulas.

    >>> repair_gain(0.45, 1.0, "diff_or_exact", exact=True)
    1.0
    """
    if mode == "abs":
        return after
    gained = after - before
    return max(gained, float(exact)) if mode == "diff_or_exact" and gained >= 0 else gained


def passes_barrier(refined: str, answer: str, solution: str | None, *, slack: int = 2) -> bool:
    """Whether a refined answer still reasons: it has nearly as many numbers as what it came from.

        n(y') >= min(n(solution), n(y)) - slack,    n = number of digit groups

    Keeps out answers that only copy a result from the critique. AutoMathCritique, arXiv:2411.16579.

    Args:
        refined: y'.
        answer: y.
        solution: a reference solution; None: there is none, and y alone is the measure (ours).
        slack: 2 in the authors' code.

    >>> passes_barrier("1 2 3", "1 2 3 4 5 6 7 8", "1 2 3 4 5 6")
    False
    """
    least = numbers_in(answer)
    if solution is not None:
        least = min(least, numbers_in(solution))
    return numbers_in(refined) >= least - slack


def numbers_in(text: str) -> int:
    """Groups of digits in a text.

    >>> numbers_in("12+3=15; 2x")
    4
    """
    return len(re.findall(r"\d+", text))
