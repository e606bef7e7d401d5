"""A token world small enough to know everything about it."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from llmac.core.protocols import Completion, Request
from llmac.core.types import Finish, Trajectory


class ExactWorld:
    """An enumerable token MDP with a softmax policy; V and Q by dynamic programming.

    Symbols are 0..K-1; `stop` ends the response, `horizon` ends it at the latest. `reward(tokens)`
    arrives with the last of `tokens`, for every prefix. The policy's `logits`, one row a state, are
    random unless given.
    """

    def __init__(
        self,
        *,
        symbols: int,
        horizon: int,
        reward: Callable[[tuple[int, ...]], float],
        stop: int | None = None,
        gamma: float = 1.0,
        seed: int = 0,
        logits: torch.Tensor | None = None,
    ) -> None:
        self.symbols, self.horizon, self.reward = symbols, horizon, reward
        self.stop, self.gamma = stop, gamma
        self.states = [
            prefix
            for length in range(horizon)
            for prefix in itertools.product(range(symbols), repeat=length)
            if stop not in prefix
        ]
        self.row = {state: index for index, state in enumerate(self.states)}
        if logits is None:
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(
                len(self.states), symbols, generator=generator, dtype=torch.float64
            )
        self.logits = logits.clone().requires_grad_()
        self._values: dict[tuple[int, ...], float] = {}
        self._policy = self.logits.detach().softmax(dim=-1)

    def ended(self, tokens: tuple[int, ...]) -> bool:
        """No token follows."""
        return len(tokens) == self.horizon or (bool(tokens) and tokens[-1] == self.stop)

    def value(self, tokens: tuple[int, ...]) -> float:
        """V(s), exact."""
        if self.ended(tokens):
            return 0.0
        if tokens not in self._values:
            chance = self._policy[self.row[tokens]]
            self._values[tokens] = sum(
                float(chance[action]) * self.action_value(tokens, action)
                for action in range(self.symbols)
            )
        return self._values[tokens]

    def action_value(self, tokens: tuple[int, ...], action: int) -> float:
        """Q(s, a), exact."""
        after = (*tokens, action)
        return self.reward(after) + self.gamma * self.value(after)

    def responses(self) -> SimpleNamespace:
        """Every possible response as a row, with its probability: expectations are weighted sums."""
        tokens = [
            tokens
            for length in range(1, self.horizon + 1)
            for tokens in itertools.product(range(self.symbols), repeat=length)
            if self.ended(tokens) and self.stop not in tokens[:-1]
        ]
        shape = len(tokens), self.horizon
        mask = torch.zeros(shape, dtype=torch.bool)
        rewards = torch.zeros(shape, dtype=torch.float64)
        values, action_values = torch.zeros_like(rewards), torch.zeros_like(rewards)
        state = torch.zeros(shape, dtype=torch.long)
        action = torch.zeros(shape, dtype=torch.long)
        for row, response in enumerate(tokens):
            for t, token in enumerate(response):
                mask[row, t] = True
                rewards[row, t] = self.reward(response[: t + 1])
                values[row, t] = self.value(response[:t])
                action_values[row, t] = self.action_value(response[:t], token)
                state[row, t], action[row, t] = self.row[response[:t]], token
        logprobs = self.logits.log_softmax(dim=-1)[state, action].where(mask, 0.0)
        return SimpleNamespace(
            tokens=tokens,
            mask=mask,
            rewards=rewards,
            values=values,
            advantages=action_values - values,
            logprobs=logprobs,
            chance=logprobs.sum(dim=1).exp(),
            bootstrap=torch.zeros(len(tokens), dtype=torch.float64),
            decision=torch.where(mask, state * self.symbols + action, -1),
        )

    def gradient(self, objective: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the policy's logits."""
        return torch.autograd.grad(objective, self.logits, retain_graph=True)[0]

    def expected_by_decision(self, world: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
        """E[x_t | s_t, a_t], laid out as [B, T]: what an unbiased advantage estimate averages to."""
        chance = world.chance.detach()[:, None].expand_as(x)
        total = torch.zeros(len(self.states) * self.symbols, dtype=torch.float64)
        weight = torch.zeros_like(total)
        total.index_add_(0, world.decision[world.mask], (chance * x)[world.mask])
        weight.index_add_(0, world.decision[world.mask], chance[world.mask])
        return (total / weight)[world.decision.clamp(min=0)].where(world.mask, 0.0)


class WorldEngine:
    """A `RolloutEngine` whose policy is a world's, and the scorer of its responses; prompts are of one token."""

    def __init__(self, world: ExactWorld) -> None:
        self.world, self.policy_version = world, 0
        self.asked: list[list[Request]] = []
        self.judged: list[Trajectory] = []
        self._policy = world.logits.detach().softmax(dim=-1).tolist()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.asked.append(list(requests))
        return [[self._walk(request, k) for k in range(request.params.n)] for request in requests]

    def _walk(self, request: Request, k: int) -> Completion:
        dice = random.Random((request.params.seed or 0) * 1000 + k)
        before = tokens = request.prompt_ids[1:]
        while len(tokens) - len(before) < request.params.max_new_tokens:
            weights = self._policy[self.world.row[tokens]]
            tokens = (*tokens, *dice.choices(range(self.world.symbols), weights))
            if self.world.ended(tokens):
                break
        stopped = tokens[-1] == self.world.stop
        return Completion(
            token_ids=tokens[len(before) :],
            logprobs=(-1.0,) * (len(tokens) - len(before)),
            finish=Finish.STOP if stopped else Finish.LENGTH,
            policy_version=self.policy_version,
        )

    def score(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Rewards are those that arrive with the last token."""
        self.judged += trajectories
        return [replace(t, reward=self.world.reward(t.response_ids)) for t in trajectories]
