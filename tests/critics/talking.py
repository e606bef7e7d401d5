"""An engine that says what a test has it say, in characters, and a critic that speaks through it."""

import dataclasses
from functools import partial

import torch

from llmac.core.collate import collate
from llmac.core.measures import Sum
from llmac.core.protocols import Completion, Player
from llmac.core.types import Finish, Prompt, Rollouts, Trajectory
from llmac.critics.generative import GenerativeConfig
from llmac.new_actor import model_named

LIMIT = 9


def encode(text):
    return tuple(map(ord, text))


def read(ids):
    return "".join(map(chr, ids))


class Talker:
    """Answers each prompt by `say(text, number of the sample)`; keeps what it was asked."""

    def __init__(self, say):
        self.say, self.policy_version, self.asked, self.loaded = say, 0, [], []

    def generate(self, requests):
        self.asked.append(requests)
        return [
            [self.completion(self.say(read(r.prompt_ids), n)) for n in range(r.params.n)]
            for r in requests
        ]

    def completion(self, text):
        ids = encode(text)
        return Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish=Finish.STOP)

    def load_weights(self, weights, version):
        self.policy_version = version
        self.loaded.append((version, list(weights)))

    def sleep(self):
        """Nothing to free."""

    wake = close = sleep

    @property
    def prompts(self):
        """Texts of the last call."""
        return [read(r.prompt_ids) for r in self.asked[-1]]


def player(engine):
    return Player(engine=engine, encode=encode, decode=read, read=read)


class Learning:
    """A language model that only remembers what it was taught."""

    def __init__(self, bench, order):
        self.model, self.order, self.taught, self.saved = bench.policy.model, order, [], []

    def annotate(self, batch, *, reference):
        return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)

    def update(self, rollouts, credit, algorithm):
        self.taught.append((rollouts, credit, algorithm))
        return {"actor/taught": Sum(1.0), "critic/lr": Sum(1.0)}

    def weights(self):
        yield "w", torch.tensor(float(len(self.taught)))

    def logprobs_of(self, prompt_ids, response_ids):
        return [-1.0] * len(response_ids)

    def save(self, directory):
        (directory / "taught").write_text(str(len(self.taught)))

    def load(self, directory):
        self.taught = [None] * int((directory / "taught").read_text())


def talking(bench, say, template, engine=None, **settings):
    """A generative critic over a `Talker`, or over the policy's with `engine="shared"`; and the critic's engine."""
    policys = Talker(say)
    talker = policys if engine == "shared" else Talker(say)
    bench = dataclasses.replace(
        bench,
        engine=policys,
        player=player(policys),
        new_player=lambda name, longest: player(talker),
        new_policy=lambda order: Learning(bench, order),
        model_named=partial(model_named, bench.model),
    )
    extra = {} if engine is None else {"engine": engine}
    config = GenerativeConfig(template=str(template), max_new_tokens=50, **extra, **settings)
    return config.build(bench), talker


def row(text, reward, problem="p", finish=Finish.STOP):
    ids = encode(text)
    return Trajectory(
        prompt=Prompt(id=problem, token_ids=encode(problem), source=problem),
        response_ids=ids,
        action_mask=(True,) * len(ids),
        sampler_logprobs=(-0.5,) * len(ids),
        finish=finish,
        group=ord(problem),
        reward=reward,
    )


def rollouts_of(rows):
    batch = collate(rows, length_limit=LIMIT)
    return Rollouts.of(batch, old_logprobs=batch.sampler_logprobs)


def starts_at(rollouts, *positions):
    """Those of each row that has as many tokens."""
    starts = torch.zeros_like(rollouts.action_mask)
    starts[:, list(positions)] = True
    return starts & rollouts.action_mask
