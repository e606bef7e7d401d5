"""A world small enough to know everything about: three prompts, four symbols, at most five tokens.

Prompt p is answered by  p, any, p+1 mod 3, at most one more, end:  three decisions must be right,
and an answer that does not end within five tokens is wrong. A policy that knows nothing succeeds
2.05% of the time: 1/4 · 3/4 · 1/4 · (1/4 + 3/4 · 1/4).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from llmac.algorithms.base import Algorithm
from llmac.core.collate import collate
from llmac.core.measures import Metrics
from llmac.core.protocols import (
    Completion,
    Demonstration,
    NeedsDemonstrations,
    NeedsPartner,
    Player,
    Request,
    RolloutPlan,
    SamplingParams,
)
from llmac.core.spans import span_values
from llmac.core.types import (
    Batch,
    Credit,
    CriticTargets,
    Finish,
    Messages,
    Prompt,
    Rollouts,
    Trajectory,
    Values,
)

from ..making import segments_of

PROMPTS, SYMBOLS, END, LIMIT = 3, 4, 3, 5
STATES_PER_PROMPT = sum(SYMBOLS**depth for depth in range(LIMIT + 1))


def states(prompts: Tensor, responses: Tensor) -> Tensor:
    """Index of s_0 ... s_T for each row: [B, T+1]."""
    index = [prompts * STATES_PER_PROMPT]
    code, first = torch.zeros_like(prompts), 0
    for t in range(responses.shape[1]):
        code = code * SYMBOLS + responses[:, t]
        first += SYMBOLS**t
        index.append(prompts * STATES_PER_PROMPT + first + code)
    return torch.stack(index, dim=1)


def reward(prompt: int, response: Sequence[int]) -> float:
    right = len(response) in (4, 5) and response[0] == prompt and response[1] != END
    return float(right and response[2] == (prompt + 1) % 3 and response[-1] == END)


def score(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    return [
        dataclasses.replace(t, reward=reward(t.prompt.token_ids[0], t.response_ids))
        for t in trajectories
    ]


def shown(prompt: int) -> Demonstration:
    """A right answer."""
    return Demonstration(token_ids=(prompt, 0, (prompt + 1) % 3, END), text="")


class Prompts:
    """The three prompts, round and round."""

    def __init__(self) -> None:
        self.cursor = 0

    def take(self, count: int) -> list[Prompt]:
        ids = [(self.cursor + i) % PROMPTS for i in range(count)]
        self.cursor += count
        return [Prompt(id=f"p{p}", token_ids=(p,), source=str(p)) for p in ids]


class TablePolicy(torch.nn.Module):
    """One row of logits for every state."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(PROMPTS * STATES_PER_PROMPT, SYMBOLS))

    def forward(self, rows: Batch | Rollouts) -> tuple[Tensor, Tensor]:
        """log π(a_t|s_t) and the entropy at s_t, [B, T]."""
        at = states(prompts_of(rows), rows.response_ids)[:, :-1]
        logprobs = self.logits[at].log_softmax(-1)
        return logprobs.gather(-1, rows.response_ids[..., None]).squeeze(-1), -(
            logprobs.exp() * logprobs
        ).sum(-1)

    @torch.no_grad()
    def success(self) -> float:
        """Exact: the probability of all right answers, averaged over prompts."""
        answers = [
            (p, (p, a, (p + 1) % 3, *more, END))
            for p in range(PROMPTS)
            for a in range(END)
            for more in itertools.chain([()], itertools.product(range(END)))
        ]
        total = 0.0
        for prompt, answer in answers:
            response = torch.tensor([answer])
            at = states(torch.tensor([prompt]), response)[:, :-1]
            total += (
                self.logits[at].log_softmax(-1).gather(-1, response[..., None]).sum().exp().item()
            )
        return total / PROMPTS


class TableEngine:
    """Samples from its own copy of the table, as an engine does from its own copy of the
    weights. A request is a prompt, or a prompt and the beginning of its response."""

    def __init__(self) -> None:
        self.logits = torch.zeros(PROMPTS * STATES_PER_PROMPT, SYMBOLS)
        self.policy_version = 0

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        random = torch.Generator().manual_seed(requests[0].params.seed or 0 if requests else 0)
        answers: dict[int, list[Completion]] = {}
        for number, alike in _by_shape(requests):
            rows = iter(self._continue([requests[i] for i in alike], number, random))
            answers |= {i: list(itertools.islice(rows, requests[i].params.n)) for i in alike}
        return [answers[i] for i in range(len(requests))]

    def _continue(
        self, requests: Sequence[Request], number: int, random: torch.Generator
    ) -> list[Completion]:
        """`number` more tokens at most, to responses that have begun equally long."""
        begun = torch.tensor([r.prompt_ids for r in requests for _ in range(r.params.n)])
        prompts, responses = begun[:, 0], begun[:, 1:]
        logprobs = []
        for _ in range(number):
            distribution = self.logits[states(prompts, responses)[:, -1]].log_softmax(-1)
            token = (
                distribution.argmax(-1, keepdim=True)
                if requests[0].params.temperature == 0
                else distribution.exp().multinomial(1, generator=random)
            )
            logprobs.append(distribution.gather(-1, token))
            responses = torch.cat([responses, token], dim=1)
        new = responses[:, begun.shape[1] - 1 :]
        ended = (new == END).any(-1).tolist()
        length = ((new == END).cumsum(-1) - (new == END).int() == 0).sum(-1).tolist()
        return [
            Completion(
                token_ids=tuple(tokens[:n]),
                logprobs=tuple(said[:n]),
                finish=Finish.STOP if stopped else Finish.LENGTH,
                policy_version=self.policy_version,
            )
            for tokens, said, n, stopped in zip(
                new.tolist(), torch.cat(logprobs, dim=1).tolist(), length, ended, strict=True
            )
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.logits = dict(weights)["logits"].detach().clone()
        self.policy_version = version

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def _by_shape(requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
    """Tokens wanted, and the places of the requests that want as many to as long a beginning."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, request in enumerate(requests):
        shape = len(request.prompt_ids), request.params.max_new_tokens
        shapes.setdefault(shape, []).append(i)
    yield from ((number, alike) for (_, number), alike in shapes.items())


class Echo(TableEngine):
    """A player without thoughts: says nothing to a prompt, and what it is told behind one again."""

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return [
            [
                Completion(
                    token_ids=r.prompt_ids[1:],
                    logprobs=(0.0,) * len(r.prompt_ids[1:]),
                    finish=Finish.STOP,
                )
            ]
            * r.params.n
            for r in requests
        ]


def player(engine: TableEngine, hears: Callable[[str], str]) -> Player:
    """Speaks in digits, and hears those of what it hears."""

    def encode(written: str | Messages) -> tuple[int, ...]:
        return tuple(int(x) for x in hears(str(written)) if x.isdigit())

    def decode(ids: Sequence[int]) -> str:
        return "".join(map(str, ids))

    return Player(engine=engine, encode=encode, decode=decode, read=decode)


class TableCritic:
    """V(s) as a table, moved halfway to the mean target of each state."""

    def __init__(self) -> None:
        self.table = torch.zeros(PROMPTS * STATES_PER_PROMPT)

    def values(self, rollouts: Rollouts, starts: Tensor) -> Values:
        said = self.table[states(prompts_of(rollouts), rollouts.response_ids)]
        last = said.gather(1, rollouts.action_mask.sum(-1, keepdim=True)).squeeze(-1)
        return Values(
            at=said[:, :-1], starts=starts, bootstrap=torch.where(rollouts.truncated, last, 0.0)
        )

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        return self.learn(states(prompts_of(rollouts), rollouts.response_ids)[:, :-1], targets)

    def learn(self, where: Tensor, targets: CriticTargets) -> Metrics:
        at = where[targets.value_mask]
        total = torch.zeros_like(self.table).index_add(0, at, targets.returns[targets.value_mask])
        count = torch.zeros_like(self.table).index_add(0, at, torch.ones(len(at)))
        seen = count > 0
        self.table[seen] += 0.5 * (total[seen] / count[seen] - self.table[seen])
        return {}

    def observe(self, rollouts: Rollouts) -> Metrics:
        """Learn from outcomes alone, for cards that teach their critic nothing."""
        outcomes = rollouts.rewards.sum(-1, keepdim=True).expand_as(rollouts.rewards)
        mask = rollouts.action_mask
        return self.update(
            rollouts, CriticTargets(returns=outcomes, value_mask=mask, old_values=outcomes)
        )


class OutcomeCritic(TableCritic):
    """Right and wrong as two classes: says how likely the one it was is, once a token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table += 0.5

    def values(self, rollouts: Rollouts, starts: Tensor) -> Values:
        right = self.table[states(prompts_of(rollouts), rollouts.response_ids)][:, 1:]
        chances = torch.where(rollouts.rewards.sum(-1, keepdim=True) > 0.5, right, 1 - right)
        return dataclasses.replace(super().values(rollouts, starts), outcome_chances=chances)

    def update(self, rollouts: Rollouts, targets: CriticTargets) -> Metrics:
        at = states(prompts_of(rollouts), rollouts.response_ids)[:, 1:]
        lessons = dataclasses.replace(
            targets,
            returns=targets.returns.sum(-1, keepdim=True).expand_as(at),
            value_mask=rollouts.action_mask,
        )
        return self.learn(at, lessons)


class PlannedCritic(TableCritic):
    """Says what the card's plan knows."""

    def values(self, rollouts: Rollouts, starts: Tensor) -> Values:
        return span_values(rollouts)


def prompts_of(rows: Batch | Rollouts) -> Tensor:
    return torch.tensor([t.prompt.token_ids[0] for t in rows.trajectories])


def train(
    card: Algorithm,
    *,
    steps: int,
    rows: int = 192,
    lr: float = 0.3,
    minibatches: int = 2,
    until: float = 2.0,
    sign: float = 1.0,
    seed: int = 0,
    plan: RolloutPlan | None = None,
    critic: TableCritic | None = None,
) -> list[float]:
    """The training loop in small: success rate before each step and after the last.

    A plan or a critic from elsewhere takes the place of the card's; such a critic does not observe.
    """
    torch.manual_seed(seed)
    policy, reference, engine, prompts = TablePolicy(), TablePolicy(), TableEngine(), Prompts()
    frozen = critic is not None or card.plan_knows_values
    if card.plan_knows_values:
        critic = PlannedCritic()
    elif critic is None and card.uses_values:
        classes = card.default_critic == "code_outcomes"
        critic = OutcomeCritic() if classes else TableCritic()
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    plan = plan or card.plan(
        prompts_per_step=max(rows // card.group_size, PROMPTS),
        sampling=SamplingParams(max_new_tokens=LIMIT),
    )
    if isinstance(plan, NeedsDemonstrations):
        plan.completions = {f"p{p}": shown(p) for p in range(PROMPTS)}
    if isinstance(plan, NeedsPartner):
        plan.player = player(engine, lambda text: text.split("|")[0])
        plan.partner = player(Echo(), lambda text: text)
    memory = card.memory()
    remembered = {} if memory is None else {"memory": memory}
    history = [policy.success()]

    for step in range(steps):
        trajectories, _ = plan.rollout(engine, prompts, score, seed=seed * 10_000 + step)
        rollouts = annotate(
            collate(trajectories, length_limit=plan.length_limit), policy, reference, card
        )
        values = critic.values(rollouts, segments_of(card, rollouts)) if critic else None
        credit = card.credit(rollouts, values, **remembered)
        if credit.critic_targets:
            critic.update(rollouts, credit.critic_targets)
        elif critic and not frozen:
            critic.observe(rollouts)

        for number, index in enumerate(_minibatches(rollouts, minibatches, card)):
            minibatch = rollouts.rows(index)
            known = credit.rows(index, minibatch.action_mask.shape[1])
            if card.refreshes_credit and number:
                known = card.refreshed(known, minibatch, policy(minibatch)[0].detach())
            known = _turned(known, sign)
            weight = card.loss_weight(minibatch, known)
            optimizer.zero_grad()
            for part in torch.arange(len(index)).chunk(2):
                micro = minibatch.rows(part)
                logprobs, entropy = policy(micro)
                loss = card.policy_loss(
                    logprobs, micro, known.rows(part, micro.action_mask.shape[1]), entropy=entropy
                )
                (loss.total / weight).backward()
            optimizer.step()
        engine.load_weights([("logits", policy.logits)], step + 1)
        history.append(policy.success())
        if history[-1] >= until:
            break
    return history


def _minibatches(rollouts: Rollouts, count: int, card: Algorithm) -> Sequence[Tensor]:
    """Rows of each optimizer step, drawn at random: whole groups where credit follows the policy."""
    order = torch.randperm(len(rollouts.trajectories))
    if not card.refreshes_credit:
        return order.chunk(count)
    parts = rollouts.group.unique()[torch.randperm(len(rollouts.group.unique()))].chunk(count)
    return [order[torch.isin(rollouts.group[order], part)] for part in parts]


def _turned(credit: Credit, sign: float) -> Credit:
    """With another sign of all that the policy is drawn to."""
    likelihood = None if credit.likelihood is None else sign * credit.likelihood
    return dataclasses.replace(credit, advantages=sign * credit.advantages, likelihood=likelihood)


@torch.no_grad()
def annotate(
    batch: Batch, policy: TablePolicy, reference: TablePolicy, card: Algorithm
) -> Rollouts:
    mask, replayed = batch.action_mask, torch.tensor([t.age > 0 for t in batch.trajectories])
    old = torch.where(replayed[:, None], batch.sampler_logprobs, policy(batch)[0])
    return Rollouts(
        **{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)},
        old_logprobs=torch.where(mask, old, 0.0),
        ref_logprobs=torch.where(mask, reference(batch)[0], 0.0) if card.uses_reference else None,
    )
