"""SPO-tree: segments that branch, each worth what its end is worth more than its start.

Segment Policy Optimization, Guo et al. 2025, arXiv:2505.23564; formulas as in the authors' code. A
step grows trees of responses (`core.tree`); siblings are each other's Monte-Carlo samples, so that
no critic is learned and no continuation thrown away. Needs: one outcome reward per response.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from llmac.core.diagnostics import explained_variance
from llmac.core.edges import EdgeAdvantage, in_deviations, prover
from llmac.core.measures import Last
from llmac.core.protocols import RolloutPlan, SamplingParams
from llmac.core.returns import segment_gae, spread_from_starts
from llmac.core.segments import response_start
from llmac.core.tree import Tree
from llmac.core.types import AllSum, Credit, Rollouts, Values, identity

from .base import mean_over
from .segment_policy import DoubtfulTokens


@dataclass(frozen=True, kw_only=True)
class SPOTree(DoubtfulTokens):
    """SPO-tree: responses that branch; a segment is worth what its end is worth above its start.

        V(node) = mean of V over its children                        V(leaf) = reward
        a = V(child) - V(parent)                                     rloo, leave_one_out
        a = (V(child) - V(parent)) / (std of V over siblings + 1e-8) grpo
        A = a + prover_weight · (f(V(child)) - f(V(parent)))         f(x) = 1 - (1 - x)^best_of

    Every token of the segment has A; which are trained, and how, `DoubtfulTokens` says. Edges that
    are not used in a step may be in one of the next `replay_steps`. A leaf cut at the length limit
    has the reward that it was given.

    Where this differs from the authors' code, besides what `DoubtfulTokens` lists: π_old of replayed
    edges is what the sampler said, and not what the trainer said then; younger edges are used
    first, among equals chance decides, and at most `replay_steps` times a step's rows wait; where
    edges are missing, the step is smaller, while theirs repeats some; means of equal rewards are
    exactly equal, so that rounding keeps no edge.
    """

    default_critic: ClassVar[str | None] = "tree_mean"
    teaches_critic: ClassVar[bool] = False

    group_size: int = field(default=216, init=False)
    """Responses to each prompt if none ends early: the product of `branching`, and no key of its
    own."""
    branching: tuple[int, ...] = (6, 6, 6)
    """Segments sampled from the prompt, from the end of each of those, and so on. (6, 6, 6) and
    (4, 5, 6) in SPO's runs. 1 at a level says nothing of its edges, but makes segments shorter."""
    segment_tokens: int = 30
    """Most tokens of a segment; those of the last level end where the response does. 30 in SPO's
    GSM8K runs with Rho-1B, 66 to 600 elsewhere."""
    edge_advantage: EdgeAdvantage = "rloo"
    """rloo: what SPO's code calls so, though V(parent) contains the edge itself, and with b siblings
    the advantage is (b - 1)/b of the true one on average; grpo: the same in deviations of the
    siblings; leave_one_out: V(parent) without the edge, unbiased, ours."""
    keep: Literal["informative", "all"] = "informative"
    """informative: edges whose ends are worth the same are dropped (SPO: a + f(V(child)) -
    f(V(parent)) ≠ 0); all: they stay, with advantage 0."""
    best_of: float = 4.0
    """Attempts of the prover. 4 in SPO's code, whose rule for `keep` has it, too, and decides alike
    for every number."""
    prover_weight: float = 0.0
    """Weight of what the edge is worth to a policy that has `best_of` attempts. 0: SPO; 5: the
    variant that its code calls PAV."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Reward of a failure and of a success: the prover's chance lies between."""
    edges_per_step: int | None = None
    """Rows of a step, over all processes, each of which rounds its share up; None: 64 for each
    prompt, as in SPO's GSM8K runs (1,024 of 16). 16 for each in its MATH runs (512 of 32)."""
    edges_per_prompt: int | None = 32
    """Most rows of a step that answer the same prompt; None: no such bound. 32 in SPO's code."""
    replay_steps: int = 8
    """Later steps in which an edge that was not used may be; 0: it is forgotten. 8 in SPO's code."""
    merge_duplicates: bool = False
    """Whether equal segments from one node are gone on from once. It saves tokens where the policy
    is sure, and the edges share their samples. Ours."""

    def __post_init__(self) -> None:
        """Refuse trees that cannot grow, and bounds that leave nothing."""
        self._require(
            "branching",
            bool(self.branching) and min(self.branching) >= 1,
            "one number a level, each at least 1",
        )
        object.__setattr__(self, "group_size", math.prod(self.branching))
        super().__post_init__()
        self._require(
            "branching",
            self.edge_advantage != "leave_one_out" or min(self.branching) >= 2,
            "at least 2 at every level when edge_advantage is leave_one_out: a segment is compared "
            "with others that begin where it does",
        )
        self._require(
            "branching",
            self.keep == "all" or max(self.branching) >= 2,
            "at least 2 at some level when keep is informative: an only child is worth what its "
            "parent is, and its edge is dropped",
        )
        self._require("segment_tokens", self.segment_tokens >= 1, "at least 1")
        self._require("best_of", 1 <= self.best_of < math.inf, "finite and at least 1")
        self._require("prover_weight", 0 <= self.prover_weight < math.inf, "finite and at least 0")
        low, high = self.reward_range
        self._require(
            "reward_range",
            -math.inf < low < high < math.inf,
            "(failure, success), finite and ascending",
        )
        for name in ("best_of", "reward_range"):
            self._without_effect(name, self.prover_weight == 0, "set prover_weight above 0")
        for name in ("edges_per_step", "edges_per_prompt"):
            bound = getattr(self, name)
            self._require(name, bound is None or bound >= 1, "None, or at least 1")
        self._require("replay_steps", self.replay_steps >= 0, "at least 0")

    @property
    def keeps_groups(self) -> bool:
        """False: what is judged are segments, and those of a tree may be used in several steps."""
        return False

    @property
    def plan_knows_values(self) -> bool:
        """True: V of both ends of an edge."""
        return True

    def plan(self, *, prompts_per_step: int, sampling: SamplingParams) -> RolloutPlan:
        """A tree for each of this rank's prompts, and edges of earlier ones.

        Raises:
            ValueError: no response is long enough to reach the last level.
        """
        inner, limit = len(self.branching) - 1, sampling.max_new_tokens
        if inner * self.segment_tokens >= limit:
            raise ValueError(
                f"segment_tokens is {self.segment_tokens} and branching {self.branching}, so that "
                f"the last level would begin after {inner * self.segment_tokens} tokens, and a "
                f"response has at most {limit}; lower segment_tokens to at most "
                f"{max(1, (limit - 1) // inner)}, or leave out a level"
            )
        return Tree(
            branching=self.branching,
            segment_tokens=self.segment_tokens,
            prompts_per_step=prompts_per_step,
            sampling=sampling,
            edge_advantage=self.edge_advantage,
            keep=self.keep,
            edges_per_step=self.edges_per_step,
            edges_per_prompt=self.edges_per_prompt,
            replay_steps=self.replay_steps,
            merge_duplicates=self.merge_duplicates,
        )

    def segments(self, rollouts: Rollouts) -> Bool[Tensor, "B T"]:
        """One segment a row: its own tokens."""
        return response_start(rollouts.action_mask & rollouts.fresh)

    def credit(
        self, rollouts: Rollouts, values: Values | None, *, sum_across: AllSum = identity
    ) -> Credit:
        """What each edge is worth, given to its own tokens.

        Raises:
            ValueError: values are missing, or with "grpo" the deviation of an edge's siblings.
        """
        if values is None:
            raise ValueError(
                "SPOTree needs the values that its plan knows and got none; set critic: "
                "{name: tree_mean}"
            )
        own = rollouts.action_mask & rollouts.fresh
        starts = values.starts & own
        at = values.at.masked_fill(~starts, 0.0)
        gained = segment_gae(
            self.shaped_rewards(rollouts),
            at,
            starts,
            # A row cut at the limit is a leaf: its reward is all that it is worth.
            values.bootstrap.where(rollouts.paused, 0.0),
            gamma=1.0,
            lam=0.0,
            action_mask=own,
        )
        raw = self._judged(gained, spread_from_starts(at, starts), rollouts)
        advantages = self.normalized(raw, rollouts, sum_across)
        explained = explained_variance(at, at + gained, starts, sum_across=sum_across)
        return self.make_credit(
            rollouts,
            advantages,
            sum_across=sum_across,
            metrics={
                "critic/values/mean": mean_over(at, starts),
                # Of V where segments end, what V where they start foresaw.
                "critic/vf_explained_var": Last(explained),
            },
        )

    def _judged(
        self, gained: Float[Tensor, "B T"], start: Float[Tensor, "B T"], rollouts: Rollouts
    ) -> Float[Tensor, "B T"]:
        """A of each token, from V(child) - V(parent) and V(parent)."""
        judged = gained
        if self.edge_advantage == "grpo":
            judged = in_deviations(gained, self._sibling_std(rollouts, gained).expand_as(gained))
        if self.prover_weight == 0:
            return judged
        more = prover(start, start + gained, attempts=self.best_of, reward_range=self.reward_range)
        return judged + self.prover_weight * more

    def _sibling_std(self, rollouts: Rollouts, like: Float[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
        unknown = [t for t in rollouts.trajectories if t.sibling_std is None]
        if unknown:
            raise ValueError(
                f"edge_advantage is grpo, and {len(unknown)} rows, the first a response to prompt "
                f"{unknown[0].prompt.id}, do not say how far their siblings are apart; only a plan "
                "that samples trees knows that"
            )
        return like.new_tensor([[t.sibling_std] for t in rollouts.trajectories])
