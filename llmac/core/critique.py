"""Two players: one answers, the other criticises in words, and the first one tries again.

    x -> y ~ actor(x) -> c ~ critic(x, y) -> y' ~ actor(x, y, c)

One of the two is the policy that learns; the other one is frozen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmac.core.critique_draw import evenly, filled_up
from llmac.core.critique_rows import Keep, critiques_as_rows, refinements_as_rows
from llmac.core.exchange import Attempt, Exchange, Said, Scored, accuracies
from llmac.core.measures import Mean, Measure, Sum
from llmac.core.plans import request_seed
from llmac.core.protocols import Player, PromptSource, RolloutEngine, SamplingParams, Scorer
from llmac.core.refinement import Judge
from llmac.core.types import AllSum, Prompt, Trajectory, identity
from llmac.core.verdicts import Verdicts
from llmac.core.voices import Memory, Voice
from llmac.core.wording import Wording

TOLERANCE = 1e-6
"""Slack of `solved_at`, unit of reward: 0.7 + 0.2 + 0.1 is not 1.0 in floating point."""


@dataclass(kw_only=True)
class Critique:
    """Answers, critiques of them, and answers that follow the critiques.

    With `trains` "critic" a row is a critique, its prompt is what the critic was asked, its reward
    what `judge` says, and its siblings are the other critiques of the same answer: `answers_kept`
    groups a prompt. Critique-RL (arXiv:2510.24320) and RL4F (arXiv:2305.08844).

    With "actor" rows are right answers to learn by heart, of reward 1: first ones, and refined ones
    as `keep` has it. Answers that are right already are not criticised unless it wants that. All
    rows of a prompt are one group. How many there are differs from rank to rank; one without any
    returns a wrong answer of reward 0, which counts nothing. AutoMathCritique (arXiv:2411.16579)
    and CGI (arXiv:2503.16024).

    The frozen player is asked once for the answers it gives without chance. Rewards are those of
    the run's functions; of a frozen actor's answers they read the text that the policy's tokens
    make of it. Questions and answers that leave no room for what is asked of a player are passed
    over, and others of the step are criticised again where the critic is trained; an answer whose
    refinement has no room stands as it is. `critique/too_long` counts all of them.
    """

    trains: Literal["actor", "critic"]
    """Who the policy is."""
    prompts_per_step: int
    """Questions this rank puts in a step."""
    answers: SamplingParams
    """How first answers are sampled, `n` to each question."""
    critiques: SamplingParams
    """How critiques are, `n` of each answer."""
    refinements: SamplingParams | None
    """How refined answers are, `n` after each critique; None: nobody asks for any."""
    wording: Wording
    """What is said to the players."""
    solved_at: float
    """Reward of a right answer."""
    verdicts: Verdicts | None
    """Reads what a critique says in the end; None: critiques have no verdict."""
    judge: Judge | None = None
    """Reward of a critique, where the critic is trained."""
    keep: Keep | None = None
    """Which answers are learned, where the actor is trained."""
    answers_kept: int | None = None
    """Answers a question that are criticised, on average: half of them right and half wrong, as far
    as this rank has them in a step. None: all. With the critic only."""
    partner_model: str | None = None
    """Hub id or folder of the frozen player; None: what the policy began as."""
    player: Player | None = field(default=None, compare=False)
    """The trained policy; `build` sets it."""
    partner: Player | None = field(default=None, compare=False)
    """The frozen player; `build` sets it."""
    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse plans that ask nothing, or nothing that could be learned."""
        if self.prompts_per_step < 1:
            raise ValueError(f"prompts_per_step is at least 1; found {self.prompts_per_step}")
        kept = self.answers_kept
        if kept is not None and not 1 <= kept <= self.answers.n:
            raise ValueError(
                f"answers_kept is {kept}, and {self.answers.n} answers are sampled to a question; "
                f"it is None, or from 1 to {self.answers.n}"
            )
        lacks = self.judge if self.trains == "critic" else self.keep
        if lacks is None:
            needed = "a judge" if self.trains == "critic" else "keep"
            raise ValueError(f"a plan that trains the {self.trains} needs {needed}, and has none")
        if self.trains == "actor" and self.refinements is None:
            raise ValueError("a plan that trains the actor needs refinements, and asks for none")

    @property
    def uneven(self) -> bool:
        """Whether ranks have different numbers of rows: where right answers are learned."""
        return self.trains == "actor"

    @property
    def length_limit(self) -> int:
        """Tokens at which what the policy says is cut."""
        if self.trains == "critic":
            return self.critiques.max_new_tokens
        assert self.refinements is not None
        return max(self.answers.max_new_tokens, self.refinements.max_new_tokens)

    def rollout(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        score: Scorer,
        *,
        seed: int,
        sum_across: AllSum = identity,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        """Have `prompts_per_step` questions answered, criticised and answered again.

        Every engine is asked equally often on all ranks: for answers, for critiques, and for
        refinements if there are any.

        Args:
            engine: samples the policy.
            prompts: this rank's share of the questions.
            score: sets the rewards of answers.
            seed: of this step and rank.
            sum_across: not used.

        Returns:
            trajectories: see the class.
            metrics: those of `exchange.accuracies`, and
                `reward/mean`: of the rows, or of first answers where the actor is trained, whose
                rows are all right;
                `critique/too_long`: questions, answers and critiques that left no room;
                `critique/partner_tokens`: tokens that the frozen player sampled;
                `rollout/sampled_tokens`: tokens that both sampled;
                with the actor also `critique/answers_learned`, `critique/refinements_learned` and
                `critique/refinements_barred`.

        Raises:
            ValueError: a player is missing, or a column that `keep` reads, or no answer of this
                rank leaves room for a critique.
        """
        policy, partner = self._voices(engine, seed)
        actor, critic = (policy, partner) if self.trains == "actor" else (partner, policy)
        drawn = prompts.take(self.prompts_per_step)

        def scored(texts: Sequence[tuple[Prompt, Said]]) -> list[Scored]:
            return self._scored(texts, score, own=actor is policy)

        attempts = self._attempts(drawn, actor, scored)
        short = [a for a in attempts if critic.fits(self._to_criticise(a, critic), self.critiques)]
        too_long = len(drawn) * self.answers.n - len(short)
        criticised = self._criticised(short, seed)
        critiques = critic.say([self._to_criticise(a, critic) for a in criticised], self.critiques)
        about = [
            (number, attempt, critique)
            for number, (attempt, some) in enumerate(zip(criticised, critiques, strict=True))
            for critique in some
        ]
        refined: list[list[Scored]] = [[] for _ in about]
        if self.refinements is not None:
            refined, unrefined = self._refined(about, actor, self.refinements, scored)
            too_long += unrefined
        exchanges = [
            self._exchange(number, attempt, critique, tuple(some))
            for (number, attempt, critique), some in zip(about, refined, strict=True)
        ]
        rows, metrics = self._rows(attempts, exchanges, policy, partner)
        return rows, {**metrics, "critique/too_long": Sum(float(too_long))}

    def _refined(
        self,
        about: Sequence[tuple[int, Attempt, Said]],
        actor: Voice,
        params: SamplingParams,
        scored: Callable[[Sequence[tuple[Prompt, Said]]], list[Scored]],
    ) -> tuple[list[list[Scored]], int]:
        """What follows each critique, and how many critiques left no room for it."""
        asked = [self._to_refine(attempt, critique, actor) for _, attempt, critique in about]
        fit = [actor.fits(prompt, params) for prompt in asked]
        written = iter(actor.say([p for p, ok in zip(asked, fit, strict=True) if ok], params))
        said = [next(written) if ok else [] for ok in fit]
        judged = iter(
            scored(
                [
                    (attempt.prompt, one)
                    for (_, attempt, _), some in zip(about, said, strict=True)
                    for one in some
                ]
            )
        )
        refined = [[next(judged) for _ in some] for some in said]
        if self.trains == "critic":
            refined = [
                some or [attempt.answer]
                for some, (_, attempt, _) in zip(refined, about, strict=True)
            ]
        return refined, fit.count(False)

    def _rows(
        self,
        attempts: Sequence[Attempt],
        exchanges: Sequence[Exchange],
        policy: Voice,
        partner: Voice,
    ) -> tuple[list[Trajectory], dict[str, Measure]]:
        counts: dict[str, Measure] = {}
        if self.trains == "critic":
            assert self.judge is not None
            rows = critiques_as_rows(exchanges, self.judge, policy.player)
            rewards = [row.reward or 0.0 for row in rows]
        else:
            assert self.keep is not None
            rows, counts = refinements_as_rows(attempts, exchanges, self.keep, policy.player)
            rewards = [attempt.answer.reward for attempt in attempts]
        return rows, {
            **accuracies(attempts, exchanges, reads_verdicts=self.verdicts is not None),
            **counts,
            "reward/mean": Mean(float(sum(rewards)), float(len(rewards))),
            "critique/partner_tokens": Sum(float(partner.tokens)),
            "rollout/sampled_tokens": Sum(float(policy.tokens + partner.tokens)),
        }

    def _voices(self, engine: RolloutEngine, seed: int) -> tuple[Voice, Voice]:
        if self.player is None or self.partner is None:
            missing = "the policy" if self.player is None else "the frozen player"
            raise ValueError(
                f"a plan of two players does not know {missing}; set `player` and `partner` before "
                "the first step"
            )
        # Players with one prompt in common must not draw the same numbers.
        return (
            Voice(self.player, engine, seed=request_seed(seed, 0)),
            Voice(
                self.partner, self.partner.engine, seed=request_seed(seed, 1), memory=self._memory
            ),
        )

    def _attempts(
        self,
        drawn: Sequence[Prompt],
        actor: Voice,
        scored: Callable[[Sequence[tuple[Prompt, Said]]], list[Scored]],
    ) -> list[Attempt]:
        if self.trains == "actor":
            asked = [prompt.token_ids for prompt in drawn]
        else:
            asked = [actor.player.encode(self.wording.to_answer(p.source)) for p in drawn]
        # Prompts of the data fit the policy; what the partner's template makes of them need not.
        own = self.trains == "actor"
        short = [i for i, ids in enumerate(asked) if own or actor.fits(ids, self.answers)]
        answered = actor.say([asked[i] for i in short], self.answers, come_back=True)
        said = [(i, drawn[i], one) for i, some in zip(short, answered, strict=True) for one in some]
        answers = scored([(prompt, one) for _, prompt, one in said])
        return [
            Attempt(question=number, prompt=prompt, answer=answer)
            for (number, prompt, _), answer in zip(said, answers, strict=True)
        ]

    def _criticised(self, attempts: Sequence[Attempt], seed: int) -> list[Attempt]:
        if self.keep is not None:
            return [a for a in attempts if self.keep.also_right or not a.answer.right]
        count = (self.answers_kept or self.answers.n) * self.prompts_per_step
        if not attempts:
            raise ValueError(
                f"none of the {self.prompts_per_step} questions and their answers leaves room for "
                f"a critique of {self.critiques.max_new_tokens} tokens; lower "
                "algorithm.answer_tokens, rollout.max_new_tokens or data.max_prompt_tokens, or "
                "take models with a longer context"
            )
        right = [attempt.answer.right for attempt in attempts]
        taken = evenly(right, min(count, len(attempts)), seed=seed)
        return [attempts[i] for i in filled_up(taken, count)]

    def _to_criticise(self, attempt: Attempt, critic: Voice) -> tuple[int, ...]:
        words = self.wording.to_criticise(attempt.prompt.source, attempt.answer.said.text)
        return critic.player.encode(words)

    def _to_refine(self, attempt: Attempt, critique: Said, actor: Voice) -> tuple[int, ...]:
        words = self.wording.to_refine(
            attempt.prompt.source, attempt.answer.said.text, critique.text
        )
        return actor.player.encode(words)

    def _exchange(
        self, number: int, attempt: Attempt, critique: Said, refined: tuple[Scored, ...]
    ) -> Exchange:
        verdict, agreement = None, 0.0
        if self.verdicts is not None:
            verdict = self.verdicts.read(critique.text)
            answer = attempt.answer
            agreement = self.verdicts.agreement(verdict, reward=answer.reward, right=answer.right)
        return Exchange(
            attempt=attempt,
            number=number,
            critique=critique,
            verdict=verdict,
            agreement=agreement,
            refined=refined,
        )

    def _scored(
        self, texts: Sequence[tuple[Prompt, Said]], score: Scorer, *, own: bool
    ) -> list[Scored]:
        """Rewards of answers, which reward functions read in the policy's tokens."""
        trajectories: list[Trajectory] = []
        for number, (prompt, said) in enumerate(texts):
            ids = said.completion.token_ids if own else self._in_own_tokens(said.text)
            trajectories.append(
                Trajectory(
                    prompt=prompt,
                    response_ids=ids,
                    action_mask=(True,) * len(ids),
                    sampler_logprobs=(0.0,) * len(ids),
                    finish=said.completion.finish,
                    group=number,
                )
            )
        rewards = [t.reward or 0.0 for t in score(trajectories)]
        return [
            Scored(said=said, reward=reward, right=reward >= self.solved_at - TOLERANCE)
            for (_, said), reward in zip(texts, rewards, strict=True)
        ]

    def _in_own_tokens(self, text: str) -> tuple[int, ...]:
        assert self.player is not None
        spell = self.player.spell or self.player.encode
        return spell(text) if text else ()
