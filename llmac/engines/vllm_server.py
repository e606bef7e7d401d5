"""Sampling with `vllm serve` processes, on this machine or others: the client side. Does not import vllm.

Rank 0 starts local servers and sends weights; every rank asks the servers for its own responses. `generate` and
`load_weights` are collectives: what happened to a server is known to all ranks before any goes on, and an error on one
is an error on all.

What a dead server costs (`server_pool.py` says when it counts as dead):
    some live      its requests go to the others; a local one starts anew in the background. No update waits for it: it
                   takes part again from the first one that finds it ready, and so does somebody else's
    none lives     all ranks stop at the end of `generate`, rank 0 waits for servers, `resend` gives the current weights
                   once more, and the outstanding requests are asked again
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from llmac.core.measures import Measure, Metrics, Sum
from llmac.core.protocols import Completion, Request
from llmac.engines.manifest import Manifest
from llmac.engines.prefix_hits import PrefixHits
from llmac.engines.requests import (
    check_requests,
    end_tokens,
    generation_config_of,
    request_seeds,
)
from llmac.engines.server_facts import checked_url, health_problem
from llmac.engines.server_fleet import Fleet, LocalServer
from llmac.engines.server_pool import Job, Pool, Server
from llmac.engines.server_protocol import WeightLabel, body_of, cached_tokens, completions_of
from llmac.engines.server_ranks import Lockstep, Ranks, WeightStream, told
from llmac.engines.server_session import Sender
from llmac.errors import EngineError, LlmacError

RECOVERIES = 3
"""Times one `generate` gets over the death of all servers."""
FINE, LOST, UNSERVED, FAILED = range(4)
"""How `generate` went on a rank; the worst one decides what all ranks do."""


class VLLMServerEngine:
    """A `RolloutEngine` over one or more `vllm serve`, each possibly tensor or data parallel."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        *,
        sender: Callable[[], Sender],
        servers: Sequence[str] = (),
        launch: Callable[[], Sequence[LocalServer]] = tuple,
        max_num_seqs: int = 256,
        request_timeout_seconds: float = 600.0,
        start_timeout_seconds: float = 900.0,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """Find or start the servers and see that they are what this run needs. A collective.

        Args:
            model: Hub id or folder of the checkpoint that is trained.
            tokenizer: the one prompts were made with.
            ranks: the job.
            sender: makes what puts weights where servers can fetch them; called on rank 0.
            servers: URLs of servers that somebody else runs.
            launch: makes server processes that are not started yet; called on rank 0 when `servers` is empty.
            max_num_seqs: responses a server decodes at once. The ranks together keep twice as many there at most; what
                is more waits for the server that is free first.
            request_timeout_seconds: longest wait for one response, or for one step of an update; then the server
                counts as dead.
            start_timeout_seconds: longest wait for a local server to start.
            trust_remote_code: run code that comes with the checkpoint.
            revision: branch, tag or commit on the Hub.

        Raises:
            ConfigError: a URL that is none.
            EngineError: a server is not there, or not of the right kind; on every rank, naming it.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.resend: Callable[[], WeightStream] | None = None
        """A new stream of the weights of the last update, called on all ranks when every server has died. None: such
        a death is the end of the run."""
        self._manifest = Manifest.of(skeleton)
        self._ends = end_tokens(tokenizer, generation_config_of(model, revision))
        self._ranks = ranks
        self._room = max(1, 2 * max_num_seqs // ranks.world_size)
        self._timeout_seconds = request_timeout_seconds
        self._label = WeightLabel(0)
        self._updates = self._repeated = self._failures = 0
        self._hits = PrefixHits()
        self._incomplete: str | None = None
        self._closed = False
        self._fleet: Fleet | None = None
        self._servers: list[Server] = []
        self._agreed: set[str] = set()
        urls = [checked_url(server) for server in servers]
        error: LlmacError | None = None
        found: _Found | None = None
        with self._closed_if_it_fails():
            if ranks.is_main:
                try:
                    self._fleet = Fleet(
                        urls,
                        () if urls else launch(),
                        sender(),
                        timeout_seconds=request_timeout_seconds,
                        start_seconds=start_timeout_seconds,
                    )
                    found = self._start(
                        self._fleet, model, last_token=config.get_text_config().vocab_size - 1
                    )
                except LlmacError as failure:
                    error = failure
            found = told(self._ranks, error, found)[0]
            assert found is not None, "rank 0 raised nothing"
            self._run, self._max_tokens, self._servers = found
            self._agreed = {server.url for server in self._servers}
            told(self._ranks, self._unreachable(), None)

    @property
    def policy_version(self) -> int:
        """The version given to the last completed `load_weights`; 0 before any."""
        return self._label.version

    @property
    def reuses_prefixes(self) -> bool:
        """True: servers are started with prefix caching; one that somebody else runs is taken to have it on too."""
        return True

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`params.n` completions for each request, in the order of the requests. A collective; `requests` may be empty.

        Greedy (temperature 0) tokens report their log-probability at temperature 1. Equal seeds repeat responses up to
        rounding, which depends on what a server happens to compute together.

        Raises:
            EngineError: on any rank a request cannot be served, a response was sampled by other weights than those of
                the last update, or no server is left.
        """
        self._check_open()
        seeds = request_seeds(requests)
        answers: list[list[Completion] | None] = [None] * len(requests)
        for attempt in range(1 + RECOVERIES):
            error = self._ask_for_missing(answers, requests, seeds)
            lost = self._newly_lost()
            complete = [answer for answer in answers if answer is not None]
            served = len(complete) == len(answers)
            ended = FAILED if error else UNSERVED if not served else LOST if lost else FINE
            worst = self._ranks.max(ended)
            if worst > FINE:
                self._lose(*self._ranks.gather(lost))
                told(self._ranks, error, None)
            if worst < UNSERVED:
                return complete
            if attempt < RECOVERIES:
                self._recover()
        raise EngineError(
            f"all servers died {1 + RECOVERIES} times while sampling one set of responses; {self._obituary()}"
        )

    def load_weights(self, weights: WeightStream, version: int) -> None:
        """Replace all weights on all servers by the stream and take `version`. A collective.

        Every rank reads the stream to its end, as gathering shards is a collective too; rank 0's goes to the servers.
        Servers that were lost and are back take part. One that is lost on the way is left out; when all are, the
        update is made once more from `resend`. When it stays incomplete, the engine refuses to `generate` until a
        complete one has arrived.

        Raises:
            EngineError: names are missing, unknown or double, a shape differs, or no server took the weights; on every
                rank.
        """
        self._check_open()
        self._incomplete = f"the update to version {version} did not complete"
        self._bring_back()
        if not self._send(weights, version):
            self._recover(version)

    def metrics(self) -> dict[str, Measure]:
        """What happened to servers since the last call; combined over ranks."""
        restarts = self._fleet.restarts if self._fleet is not None else 0
        counted: dict[str, Measure] = {
            "rollout/server_failures": Sum(float(self._failures)),
            "rollout/server_restarts": Sum(float(restarts)),
            "rollout/retried_requests": Sum(float(self._repeated)),
        }
        self._failures = self._repeated = 0
        if self._fleet is not None:
            self._fleet.restarts = 0
        return counted

    def prefix_hits(self) -> Metrics:
        """The fraction of prompt tokens that servers said they had cached, since the last call."""
        return self._hits.drain()

    def sleep(self) -> None:
        """Nothing to free: servers have hardware of their own."""

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """End the servers this run started. Safe to call twice."""
        self._closed = True
        if self._fleet is not None:
            self._fleet.close()

    @staticmethod
    def _start(fleet: Fleet, model: str, last_token: int) -> "_Found":
        """On rank 0: the servers up and checked."""
        facts = fleet.start(model=model, last_token=last_token)
        return (
            uuid.uuid4().hex[:8],
            min(fact.max_model_len for fact in facts.values()),
            [Server(url=url, local=fleet.is_local(url)) for url in facts],
        )

    def _unreachable(self) -> EngineError | None:
        """Why this rank cannot ask one of the servers, which rank 0 has found healthy."""
        for server in self._servers:
            problem = health_problem(server.url)
            if problem is not None:
                return EngineError(
                    f"rank 0 reaches the server at {server.url}, rank {self._ranks.rank} does not ({problem}). On "
                    "several machines servers must listen on an address all of them reach: give it in rollout.servers"
                )
        return None

    def _ask_for_missing(
        self,
        answers: list[list[Completion] | None],
        requests: Sequence[Request],
        seeds: Sequence[int],
    ) -> EngineError | None:
        """Fill in answers that are still None, as far as servers live; returns what is wrong with a request."""
        missing = [place for place, answer in enumerate(answers) if answer is None]
        try:
            if self._incomplete is not None:
                raise EngineError(
                    f"the servers hold incomplete weights: {self._incomplete}. Call load_weights with the complete "
                    "weights before sampling"
                )
            check_requests(requests, self._max_tokens)
            pool = Pool(
                self._servers,
                first=self._ranks.rank,
                room=self._room,
                timeout_seconds=self._timeout_seconds,
            )
            jobs = [self._job(requests[place], seeds[place]) for place in missing]
            found, repeated = pool.ask(jobs, label=self._label.name)
        except EngineError as error:
            return error
        self._repeated += repeated
        for place, answer in zip(missing, found, strict=True):
            answers[place] = answer
        return None

    def _job(self, request: Request, seed: int) -> Job[list[Completion]]:
        label, params = self._label, request.params
        responses = 1 if params.temperature == 0 else params.n
        return Job(
            body=body_of(request, seed=seed, ends=self._ends),
            responses=responses,
            tokens=len(request.prompt_ids) + responses * params.max_new_tokens,
            read=lambda answer, url: self._read(answer, request, label, url),
        )

    def _read(
        self, answer: Any, request: Request, label: WeightLabel, url: str
    ) -> list[Completion]:
        """The completions of one request; how much of its prompt was cached is counted, if the server says it."""
        found = completions_of(answer, request, label, url)
        cached = cached_tokens(answer)
        if cached is not None:
            responses = 1 if request.params.temperature == 0 else len(found)
            asked = responses * len(request.prompt_ids)
            self._hits.add(asked=asked, reused=responses * cached)
        return found

    def _recover(self, version: int | None = None) -> None:
        """With no server left: wait for some, and give them the weights of the last update anew."""
        if self.resend is None:
            raise EngineError(
                f"no vLLM server is left, and nobody to send a restarted one its weights again; {self._obituary()}"
            )
        version = self._label.version if version is None else version
        self._bring_back()
        if not self._send(self.resend(), version):
            raise EngineError(
                f"no vLLM server took the weights of version {version}; {self._obituary()}"
            )

    def _bring_back(self) -> None:
        """Let servers that have come back, or were started anew, take part in the update that follows.

        Raises:
            EngineError: none is left.
        """
        gone = [server.url for server in self._servers if not server.living]
        if not gone:
            return
        problems: Mapping[str, str] = {}
        if self._fleet is not None:
            # As long as others can do the work, it does not wait for somebody else's.
            patient = len(gone) == len(self._servers)
            problems = self._fleet.bring_back(gone, patient=patient)
        problems = self._ranks.broadcast(problems)
        for server in self._servers:
            if server.url in gone:
                server.living = server.url not in problems
                server.why = problems.get(server.url, "")
        self._agreed = {server.url for server in self._servers if server.living}
        if not self._agreed:
            raise EngineError(f"no vLLM server is left; {self._obituary()}")

    def _send(self, weights: WeightStream, version: int) -> bool:
        """One update of the living servers; whether at least one took all of it."""
        self._updates += 1
        label = WeightLabel.of_update(version, update=self._updates, run=self._run)
        stream = Lockstep(weights)
        checked = self._manifest.checked(stream)
        lost: Mapping[str, str] = {}
        error: EngineError | None = None
        try:
            if self._fleet is not None:
                living = [server.url for server in self._servers if server.living]
                lost = self._fleet.send(living, checked, label.name)
            else:
                for _ in checked:
                    pass
        except Exception as failure:  # of any kind: the other ranks have to be told
            if stream.broken:
                raise  # gathering failed, on every rank or with the ranks out of step: nobody can be told
            error = _as_engine_error(failure, version)
        stream.drain()
        self._lose(told(self._ranks, error, lost)[0])
        if not self._agreed:
            return False
        self._label, self._incomplete = label, None
        return True

    def _newly_lost(self) -> dict[str, str]:
        """Why, for each server that lived when the ranks last agreed, and does not any more."""
        return {
            server.url: server.why
            for server in self._servers
            if not server.living and server.url in self._agreed
        }

    def _lose(self, *reports: Mapping[str, str]) -> None:
        """Agree with the other ranks on which servers are lost; the local ones start anew in the background."""
        lost = {url: why for report in reports for url, why in report.items()}
        for server in self._servers:
            if server.url in lost:
                server.living, server.why = False, lost[server.url]
        self._agreed -= lost.keys()
        if self._fleet is not None:
            self._failures += len(lost)
            self._fleet.lose(lost)

    def _obituary(self) -> str:
        """What every server was lost for."""
        return "; ".join(f"{server.url}: {server.why or 'healthy'}" for server in self._servers)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine's servers are closed; build a new engine")

    @contextlib.contextmanager
    def _closed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


_Found = tuple[str, int, list[Server]]
"""What rank 0 tells the others at the start: a name for the run, the longest sequence, the servers."""


def _as_engine_error(failure: Exception, version: int) -> EngineError:
    if isinstance(failure, EngineError):
        return failure
    error = EngineError(
        f"the update to version {version} failed: {type(failure).__name__}: {failure}"
    )
    error.__cause__ = failure
    return error
