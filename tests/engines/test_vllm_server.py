"""Balancing, faults, versions and agreement among ranks, against stand-ins for `vllm serve` in this process."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llmac.core.measures import Mean
from llmac.core.protocols import Request, RolloutEngine, SamplingParams
from llmac.core.types import Finish
from llmac.engines import server_pool
from llmac.engines.server_session import WeightSession
from llmac.engines.vllm_server import VLLMServerEngine
from llmac.errors import ConfigError, EngineError
from tests.engines.fake_server import FakeProcess, FakeSender, FakeServer

GENERATE = "/inference/v1/generate"


class OneRank:
    """The job of a single process."""

    rank, world_size, is_main = 0, 1, True

    def broadcast(self, item):
        return item

    def gather(self, item):
        return [item]

    def max(self, number):
        return float(number)


class Threads:
    """A job whose ranks are threads; a collective that not all enter breaks after seconds instead of hanging."""

    def __init__(self, world_size, seconds=20):
        self.everyone = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=seconds)

    def rank(self, rank):
        job = self

        class Rank:
            world_size, is_main = len(job.everyone), rank == 0

            def gather(self, item):
                job.everyone[rank] = item
                job.barrier.wait()
                everyone = list(job.everyone)
                job.barrier.wait()
                return everyone

            def broadcast(self, item):
                return self.gather(item)[0]

            def max(self, number):
                return max(self.gather(number))

        found = Rank()
        found.rank = rank
        return found

    def run(self, work):
        """`work(rank)` on every rank: its result, or the exception it ended with."""

        def on(rank):
            try:
                return work(self.rank(rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(self.everyone)) as threads:
            return list(threads.map(on, range(len(self.everyone))))


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(make_model):
    return [(name, tensor.detach()) for name, tensor in make_model(seed=1).named_parameters()]


@pytest.fixture
def servers():
    """Three servers that somebody else runs."""
    started = [FakeServer() for _ in range(3)]
    yield started
    for server in started:
        server.kill()


@pytest.fixture
def processes():
    """Two servers that the engine starts."""
    made = [FakeProcess() for _ in range(2)]
    yield made
    for process in made:
        process.server.kill()


@pytest.fixture
def build(checkpoint, tokenizer):
    """Engines over servers or processes; none outlives its test."""
    built = []

    def make(ranks=None, *, servers=(), processes=(), sender=FakeSender, seconds=5.0, **options):
        engine = VLLMServerEngine(
            str(checkpoint),
            tokenizer,
            ranks or OneRank(),
            sender=sender,
            servers=[server.url for server in servers],
            launch=lambda: processes,
            request_timeout_seconds=seconds,
            **options,
        )
        built.append(engine)
        return engine

    yield make
    for engine in built:
        engine.close()


def ask(count=12, **params):
    params = {"n": 2, "max_new_tokens": 4, "seed": 0, **params}
    return [Request(prompt_ids=(2 + i, 3), params=SamplingParams(**params)) for i in range(count)]


def check_answers(answers, requests, version):
    """Every request has its own responses, all of them, in order."""
    assert len(answers) == len(requests)
    for request, siblings in zip(requests, answers, strict=True):
        first = request.prompt_ids[0]
        assert [c.token_ids for c in siblings] == [(first, i) for i in range(request.params.n)]
        assert {c.policy_version for c in siblings} == {version}


def numbers(engine):
    return {name.removeprefix("rollout/"): int(m.value) for name, m in engine.metrics().items()}


NOTHING = {"server_failures": 0, "server_restarts": 0, "retried_requests": 0}


# ---- sampling


def test_it_is_a_rollout_engine(build, servers):
    assert isinstance(build(servers=servers), RolloutEngine)


def test_requests_go_to_all_servers_and_answers_keep_their_order(build, servers, weights):
    engine = build(servers=servers)
    engine.load_weights(weights, version=3)
    requests = ask(30)
    for server in servers:
        server.prompts.clear()
    check_answers(engine.generate(requests), requests, version=3)
    assert [len(server.prompts) for server in servers] == [10, 10, 10]
    assert numbers(engine) == NOTHING


def test_what_is_asked_has_every_parameter_and_a_seed_of_its_own(build, servers):
    bodies = []
    servers[0].broken = lambda path, body: bodies.append(body) if path == GENERATE else None
    engine = build(servers=servers[:1])
    bodies.clear()
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "stop": ("x",), "stop_token_ids": (9,)}
    engine.generate(ask(2, **params))
    assert len({body["sampling_params"].pop("seed") for body in bodies}) == 2
    assert sorted(body["token_ids"] for body in bodies) == [[2, 3], [3, 3]]
    assert bodies[0]["sampling_params"] == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 4,
        "stop": ["x"],
        "stop_token_ids": [1, 9],
        "logprobs": 0,
        "detokenize": True,
        "skip_special_tokens": False,
    }


def test_greedy_siblings_are_computed_once(build, servers):
    engine = build(servers=servers[:1])
    [siblings] = engine.generate(ask(1, n=3, temperature=0.0))
    assert [c.token_ids for c in siblings] == [(2, 0)] * 3
    assert siblings[0].finish is Finish.LENGTH
    assert siblings[0].logprobs == (-0.5, -0.5)


def test_cached_tokens_of_prompts_are_counted_where_a_server_says_them(build, servers):
    engine = build(servers=servers[:1])
    assert engine.reuses_prefixes
    engine.generate(ask(3))
    assert "rollout/prefix_hit_rate" not in engine.prefix_hits()
    servers[0].says_cached = True
    # One token in two of every prompt; greedy siblings are one response.
    engine.generate([*ask(3, n=2), *ask(1, n=4, temperature=0.0)])
    assert engine.prefix_hits()["rollout/prefix_hit_rate"] == Mean(7.0, 14.0)
    assert "rollout/prefix_hit_rate" not in engine.prefix_hits()


def test_a_slow_server_gets_less(build, servers, weights):
    engine = build(servers=servers, max_num_seqs=4)
    engine.load_weights(weights, version=1)
    servers[0].seconds, servers[1].seconds, servers[2].seconds = 0.4, 0.02, 0.02
    for server in servers:
        server.prompts.clear()
    requests = ask(60)
    check_answers(engine.generate(requests), requests, version=1)
    counts = [len(server.prompts) for server in servers]
    assert counts[0] < counts[1] / 2
    # Twice what it decodes at once, and no more.
    assert max(server.most_at_once for server in servers) == 8


def test_a_request_larger_than_the_room_is_served_alone(build, servers):
    engine = build(servers=servers[:1], max_num_seqs=2)
    requests = ask(3, n=9)
    check_answers(engine.generate(requests), requests, version=0)
    assert servers[0].most_at_once == 9


def test_a_request_too_long_for_the_servers_is_refused(build, servers):
    with pytest.raises(EngineError, match=r"130 tokens .* limit is 128"):
        build(servers=servers).generate(ask(1, max_new_tokens=128))


def test_it_samples_inside_a_running_event_loop(build, servers):
    import asyncio

    engine = build(servers=servers)

    async def notebook():
        return engine.generate(ask())

    check_answers(asyncio.run(notebook()), ask(), version=0)


def test_not_every_request_is_logged(build, servers, caplog):
    with caplog.at_level("INFO"):
        build(servers=servers).generate(ask())
    assert caplog.text == ""


# ---- versions


def test_a_stale_server_is_an_error_that_names_it(build, servers, weights):
    engine = build(servers=servers)
    engine.load_weights(weights, version=3)
    servers[1].label = "version 2, update 1 of run x"
    with pytest.raises(EngineError) as caught:
        engine.generate(ask(30))
    for word in (servers[1].url, "'version 2, update 1 of run x'", "'version 3, update 1 of run"):
        assert word in str(caught.value)


def test_two_updates_under_one_version_are_told_apart(build, servers, weights):
    engine = build(servers=servers)
    engine.load_weights(weights, version=0)
    first = servers[0].label
    engine.load_weights(weights, version=0)
    assert servers[0].label != first
    servers[0].label = first
    with pytest.raises(EngineError, match=r"update 1 of run .* expected 'version 0, update 2"):
        engine.generate(ask(30))


def test_a_server_with_weights_of_another_run_is_an_error_before_the_first_update(build, servers):
    servers[2].label = "version 7, update 8 of run y"
    with pytest.raises(EngineError, match="expected 'default'"):
        build(servers=servers).generate(ask(30))


def spoiled(**changes):
    """A server's answer with one field of its first choice changed."""

    def broken(path, body):
        if path != GENERATE:
            return None
        from tests.engines.fake_server import choice

        choices = [choice(body, i, "default") for i in range(body["sampling_params"].get("n", 1))]
        choices[0] = {**choices[0], **changes}
        return 200, {"choices": choices}

    return broken


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight_versions": None}, "does not say which weights"),
        ({"weight_versions": []}, "does not say which weights"),
        (
            {
                "weight_versions": [
                    {"version": "default", "start": 0, "end": 1},
                    {"version": "newer", "start": 1, "end": 2},
                ]
            },
            "labelled 'newer'",
        ),
        ({"logprobs": {"content": [{"logprob": -9999.0}] * 2}}, "not finite"),
        ({"logprobs": {"content": [{"logprob": -1.0}]}}, "2 tokens with 1 log-probabilities"),
        ({"logprobs": None}, "in a form llmac does not know"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_an_error(changes, said, build, servers):
    engine = build(servers=servers[:1])
    servers[0].broken = spoiled(**changes)
    with pytest.raises(EngineError, match=said):
        engine.generate(ask(3))


# ---- faults while sampling


def once(trouble, count=1):
    """`trouble` for the first `count` requests for responses, on whichever server they arrive."""
    left = [trouble] * count
    lock = threading.Lock()

    def broken(path, body):
        with lock:
            return left.pop() if path == GENERATE and left else None

    return broken


@pytest.mark.parametrize(
    "trouble", ["drop", (500, {"error": {"message": "boom"}}), (503, b"later")]
)
def test_a_passing_trouble_is_asked_again(trouble, build, servers):
    engine = build(servers=servers)
    servers[1].broken = once(trouble, count=3)
    requests = ask(30)
    check_answers(engine.generate(requests), requests, version=0)
    assert numbers(engine) == {**NOTHING, "retried_requests": 3}


def test_an_interrupted_response_is_asked_again(build, servers):
    engine = build(servers=servers)
    aborted = spoiled(finish_reason="abort")
    left = [aborted]
    servers[0].broken = lambda path, body: (
        left.pop()(path, body) if path == GENERATE and left else None
    )
    requests = ask(9)
    check_answers(engine.generate(requests), requests, version=0)
    assert numbers(engine)["retried_requests"] == 1


def test_a_request_that_always_fails_ends_the_call(build, servers):
    def broken(path, body):
        poison = path == GENERATE and body["token_ids"][0] == 5
        return (500, {"error": {"message": "CUDA error"}}) if poison else None

    engine = build(servers=servers)
    for server in servers:
        server.broken = broken
    with pytest.raises(EngineError, match=r"a request failed 7 times .* HTTP 500: CUDA error"):
        engine.generate(ask(6))


def test_a_refused_request_is_an_error_and_not_repeated(build, servers):
    def broken(path, body):
        return (400, {"error": {"message": "too long for me"}}) if path == GENERATE else None

    engine = build(servers=servers[:1])
    servers[0].broken = broken
    calls = servers[0].calls.count(GENERATE)
    with pytest.raises(EngineError, match=f"{servers[0].url} refused .* HTTP 400: too long for me"):
        engine.generate(ask(1))
    assert servers[0].calls.count(GENERATE) == calls + 1


def kill_in_the_middle(server, at=3):
    """The server dies when it gets its `at`-th request from now on."""
    seen = []

    def broken(path, body):
        if path == GENERATE:
            seen.append(path)
            if len(seen) == at:
                threading.Thread(target=server.kill).start()
            if len(seen) >= at:
                time.sleep(0.2)
                return "drop"
        return None

    server.broken = broken


def test_requests_of_a_killed_server_go_to_the_others(build, servers, weights):
    engine = build(servers=servers)
    engine.load_weights(weights, version=1)
    kill_in_the_middle(servers[1])
    requests = ask(30)
    check_answers(engine.generate(requests), requests, version=1)
    counted = numbers(engine)
    assert counted["retried_requests"] >= 3
    assert counted["server_failures"] == 1
    assert counted["server_restarts"] == 0
    # It is not asked again, and not counted again.
    check_answers(engine.generate(requests), requests, version=1)
    assert numbers(engine) == NOTHING
    # Somebody has started it again by the next update.
    servers[1].broken = lambda path, body: None
    servers[1].start()
    engine.load_weights(weights, version=2)
    check_answers(engine.generate(requests), requests, version=2)
    assert len(servers[1].prompts) >= 10
    assert servers[1].calls.count("/init_weight_transfer_engine") == 2


def test_a_dead_server_is_left_out_of_updates_until_it_is_back(build, servers, weights):
    engine = build(servers=servers, seconds=6.0)
    servers[0].kill()
    check_answers(engine.generate(ask()), ask(), version=0)
    begun = time.monotonic()
    engine.load_weights(weights, version=1)
    # The others do the work meanwhile; only a look is taken.
    assert time.monotonic() - begun < 4
    check_answers(engine.generate(ask()), ask(), version=1)
    assert numbers(engine)["server_failures"] == 1


def test_a_server_that_comes_back_with_other_weights_is_not_asked(build, servers, weights):
    engine = build(servers=servers)
    engine.load_weights(weights, version=1)

    def restarted(path, body):
        if path != GENERATE:
            return None
        servers[2].label = "default"
        return "drop"

    servers[2].broken = restarted
    requests = ask(30)
    check_answers(engine.generate(requests), requests, version=1)
    assert numbers(engine)["server_failures"] == 1


def test_a_hanging_server_is_lost_after_the_timeout(build, servers):
    engine = build(servers=servers, seconds=1.5)
    servers[0].hang()
    requests = ask(9)
    begun = time.monotonic()
    check_answers(engine.generate(requests), requests, version=0)
    assert 1.5 <= time.monotonic() - begun < 4.5
    assert numbers(engine) == {**NOTHING, "server_failures": 1, "retried_requests": 3}


def test_a_server_that_was_lost_for_hanging_is_not_revived_by_a_look(build, servers):
    """One request hangs; another fails, and the look it causes finds the server well after the first was given up."""
    engine = build(servers=servers[:2], seconds=1.0)
    hangs = threading.Event()
    seconds_until_dropped = [2.0, 0.8]

    def broken(path, body):
        if path == "/weight_info":
            hangs.wait(0.6)
        if path == GENERATE and seconds_until_dropped:
            hangs.wait(seconds_until_dropped.pop(0))
            return "drop"
        return None

    servers[0].broken = broken
    check_answers(engine.generate(ask(4)), ask(4), version=0)
    hangs.set()
    assert [server.living for server in engine._servers] == [False, True]
    assert numbers(engine)["server_failures"] == 1


def test_somebody_elses_server_is_waited_for_when_there_is_no_other(build, servers, weights):
    server = servers[0]
    engine = build(servers=[server], seconds=10.0)
    engine.load_weights(weights, version=1)
    label = server.label

    def network_is_back():
        server.start()
        server.label = label

    server.kill()
    threading.Timer(0.7, network_is_back).start()
    check_answers(engine.generate(ask(5)), ask(5), version=1)
    assert numbers(engine) == {**NOTHING, "retried_requests": 5}


def test_without_any_server_the_error_names_all_of_them(build, servers):
    engine = build(servers=servers[:2], seconds=0.3)
    for server in servers[:2]:
        server.kill()
    with pytest.raises(EngineError) as caught:
        engine.generate(ask())
    for server in servers[:2]:
        assert f"{server.url}: ConnectError" in str(caught.value)


# ---- local servers


def test_a_killed_local_server_is_started_anew_and_takes_part_after_the_next_update(
    build, processes, weights
):
    engine = build(processes=processes)
    engine.load_weights(weights, version=1)
    kill_in_the_middle(processes[0].server)
    requests = ask(20)
    check_answers(engine.generate(requests), requests, version=1)
    processes[0].server.broken = lambda path, body: None
    counted = numbers(engine)
    assert (counted["server_failures"], counted["server_restarts"]) == (1, 1)
    assert [process.starts for process in processes] == [2, 1]
    processes[0].server.prompts.clear()
    engine.load_weights(weights, version=2)
    check_answers(engine.generate(requests), requests, version=2)
    assert len(processes[0].server.prompts) == 10
    assert processes[0].server.weights == processes[1].server.weights


def test_no_update_waits_for_a_local_server_that_is_still_starting(build, processes, weights):
    engine = build(processes=processes)
    engine.load_weights(weights, version=1)
    processes[0].slow = True
    processes[0].server.kill()
    engine.generate(ask())
    for version in (2, 3):
        begun = time.monotonic()
        engine.load_weights(weights, version=version)
        assert time.monotonic() - begun < 2
        check_answers(engine.generate(ask()), ask(), version=version)
    assert processes[0].starts == 2, "it is left in peace"
    processes[0].server.start()
    engine.load_weights(weights, version=4)
    assert [server.living for server in engine._servers] == [True, True]
    assert processes[0].server.weights == processes[1].server.weights


def test_a_local_server_that_does_not_get_ready_in_time_is_started_anew(build, processes, weights):
    engine = build(processes=processes, start_timeout_seconds=0.3)
    engine.load_weights(weights, version=1)
    processes[0].slow = True
    processes[0].server.kill()
    engine.generate(ask())
    time.sleep(0.3)
    engine.load_weights(weights, version=2)
    assert [process.starts for process in processes] == [3, 1]


def test_when_the_only_server_dies_it_is_started_anew_and_fed_from_resend(
    build, processes, weights
):
    engine = build(processes=processes[:1])
    engine.load_weights(weights, version=1)
    streams = []
    engine.resend = lambda: streams.append(1) or iter(weights)
    server = processes[0].server
    seen = []

    def broken(path, body):
        if path == GENERATE:
            seen.append(body)
            if len(seen) == 3:
                server.broken = lambda path, body: None
                threading.Thread(target=server.kill).start()
                time.sleep(0.2)
                return "drop"
        return None

    server.broken = broken
    requests = ask(10)
    begun = time.monotonic()
    check_answers(engine.generate(requests), requests, version=1)
    # Not waited for, as somebody else's would be.
    assert time.monotonic() - begun < 4
    assert len(streams) == 1
    assert set(server.weights) == {name for name, _ in weights}
    counted = numbers(engine)
    assert (counted["server_failures"], counted["server_restarts"]) == (1, 1)


def test_a_hanging_local_server_is_started_anew(build, processes, weights):
    engine = build(processes=processes[:1], seconds=1.5)
    engine.load_weights(weights, version=1)
    engine.resend = lambda: iter(weights)
    processes[0].server.hang()
    check_answers(engine.generate(ask()), ask(), version=1)
    assert processes[0].starts == 2


def test_without_resend_the_death_of_the_only_server_is_an_error(build, processes, weights):
    engine = build(processes=processes[:1])
    engine.load_weights(weights, version=1)
    processes[0].server.kill()
    with pytest.raises(EngineError, match=f"no vLLM server is left.*{processes[0].url}"):
        engine.generate(ask())


def test_a_server_that_dies_every_time_ends_the_call(build, processes, weights):
    engine = build(processes=processes[:1])
    engine.load_weights(weights, version=1)
    streams = []
    engine.resend = lambda: streams.append(1) or iter(weights)
    server = processes[0].server

    def broken(path, body):
        if path == GENERATE:
            threading.Thread(target=server.kill).start()
            time.sleep(0.1)
            return "drop"
        return None

    server.broken = broken
    with pytest.raises(EngineError, match="died 4 times"):
        engine.generate(ask(1))
    assert len(streams) == 3, "after the last time nobody would ask it again"


def test_close_ends_local_servers_and_can_be_called_twice(build, processes, weights):
    engine = build(processes=processes)
    engine.close()
    engine.close()
    assert all(process.closes and process.server._http is None for process in processes)
    with pytest.raises(EngineError, match="closed"):
        engine.generate(ask())
    with pytest.raises(EngineError, match="closed"):
        engine.load_weights(weights, version=1)


# ---- updates


def test_an_update_is_one_session_on_every_server(build, servers, weights):
    engine = build(servers=servers)
    for server in servers:
        server.calls.clear()
    engine.load_weights(weights, version=5)
    assert engine.policy_version == 5
    for server in servers:
        assert server.calls == [
            "/pause?mode=abort",
            "/update_weight_version",
            "/collective_rpc",
            "/start_weight_update",
            *["/update_weights"] * math.ceil(len(weights) / 8),
            "/finish_weight_update",
            "/reset_prefix_cache",
            "/resume",
        ]
        assert server.weights == {name: float(tensor.sum()) for name, tensor in weights}
        assert server.label.startswith("version 5, update 1 of run ")


def test_after_an_update_that_broke_off_no_server_has_to_refuse_the_next(servers, weights):
    """A refusal would cost a server of several workers a restart."""
    refused = []

    def broken(path, body):
        if path == "/start_weight_update" and servers[0].session is not None:
            refused.append(path)

    servers[0].broken = broken
    session = WeightSession(FakeSender(), timeout_seconds=5.0)
    session.admit(servers[0].url)

    def breaks_off():
        yield from weights[:10]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.send([servers[0].url], breaks_off(), "half")
    assert servers[0].session, "the update is still open"
    assert session.send([servers[0].url], iter(weights), "whole") == {}
    session.close()
    assert refused == []
    assert servers[0].label == "whole"
    assert servers[0].weights == {name: float(tensor.sum()) for name, tensor in weights}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda weights: weights[:-1], "did not arrive"),
        (lambda weights: [*weights, ("extra.weight", torch.zeros(2))], r"extra\.weight"),
        (lambda weights: [*weights, weights[0]], "arrived twice"),
        (lambda weights: [(weights[0][0], torch.zeros(3, 3)), *weights[1:]], r"\(3, 3\)"),
    ],
)
def test_after_an_incomplete_update_it_refuses_until_a_complete_one(
    spoil, named, build, servers, weights
):
    engine = build(servers=servers)
    engine.load_weights(weights, version=1)
    with pytest.raises(EngineError, match=named):
        engine.load_weights(spoil(weights), version=2)
    assert engine.policy_version == 1
    assert all(server.paused and server.label == "incomplete" for server in servers)
    with pytest.raises(EngineError, match="incomplete weights: the update to version 2"):
        engine.generate(ask())
    engine.load_weights(weights, version=3)
    check_answers(engine.generate(ask()), ask(), version=3)


def test_a_bucket_is_gathered_while_the_one_before_is_loaded_and_never_overwritten(
    build, servers, weights
):
    """A bucket is readable until the next but one is asked for; a server here loads until the next is asked for."""
    asked = [threading.Event() for _ in range(20)]
    overwritten = []

    class TwoBuffers(FakeSender):
        def buckets(self, stream):
            for place, bucket in enumerate(super().buckets(stream)):
                asked[place].set()
                yield {**bucket, "place": place}
            asked[place + 1].set()

    def load(path, body):
        if path == "/update_weights":
            place = body["update_info"].pop("place")
            assert asked[place + 1].wait(timeout=5)
            time.sleep(0.05)
            overwritten.append(asked[place + 2].is_set())
        return None

    engine = build(servers=servers, sender=TwoBuffers)
    for server in servers:
        server.broken = load
    engine.load_weights(weights, version=1)
    assert overwritten == [False] * 3 * math.ceil(len(weights) / 8)
    assert servers[2].weights == {name: float(tensor.sum()) for name, tensor in weights}


def fails_at(wanted, answer, count=1):
    left = [answer] * count
    return lambda path, body: left.pop() if left and path.startswith(wanted) else None


STEPS = [
    "/pause",
    "/update_weight_version",
    "/collective_rpc",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "answer", [(500, {"error": {"message": "boom"}}), "drop"], ids=["500", "drop"]
)
def test_a_server_that_fails_in_an_update_is_left_out_and_the_others_go_on(
    step, answer, build, servers, weights
):
    engine = build(servers=servers)
    servers[1].broken = fails_at(step, answer)
    engine.load_weights(weights, version=1)
    # It gets nothing more of this update, so nobody can make it sample half of one.
    assert servers[1].paused or step == "/pause"
    assert "/resume" not in servers[1].calls or step == "/resume"
    requests = ask(30)
    for server in servers:
        server.prompts.clear()
    check_answers(engine.generate(requests), requests, version=1)
    assert [len(server.prompts) for server in servers] == [15, 0, 15]
    assert numbers(engine) == {**NOTHING, "server_failures": 1}
    engine.load_weights(weights, version=2)
    check_answers(engine.generate(requests), requests, version=2)
    assert len(servers[1].prompts) == 10


def test_a_prefix_cache_that_was_not_emptied_is_a_failure(build, servers, weights):
    engine = build(servers=servers)
    servers[0].broken = fails_at("/reset_prefix_cache", (200, {"success": False}))
    engine.load_weights(weights, version=1)
    assert numbers(engine)["server_failures"] == 1


def test_an_update_without_any_server_is_an_error_before_the_stream_is_read(
    build, servers, weights
):
    engine = build(servers=servers[:1], seconds=0.3)
    servers[0].kill()
    with pytest.raises(EngineError, match="no vLLM server is left"):
        engine.generate(ask(1))
    stream = iter(weights)
    with pytest.raises(EngineError, match=f"no vLLM server is left.*{servers[0].url}"):
        engine.load_weights(stream, version=1)
    assert len(list(stream)) == len(weights)


def test_an_error_of_the_stream_itself_comes_out_as_it_is(build, servers, weights):
    def stream():
        yield weights[0]
        raise ZeroDivisionError("gathering failed")

    engine = build(servers=servers)
    with pytest.raises(ZeroDivisionError, match="gathering failed"):
        engine.load_weights(stream(), version=1)
    with pytest.raises(EngineError, match="incomplete weights"):
        engine.generate(ask())


def test_when_an_update_fails_on_all_servers_it_is_an_error_naming_them(build, servers, weights):
    engine = build(servers=servers)
    for server in servers:
        server.broken = fails_at("/update_weights", (500, {"error": {"message": "no room"}}))
    with pytest.raises(EngineError) as caught:
        engine.load_weights(weights, version=1)
    for server in servers:
        assert f"{server.url}: /update_weights: HTTP 500: no room" in str(caught.value)
    with pytest.raises(EngineError, match="incomplete weights"):
        engine.generate(ask())
    engine.load_weights(weights, version=2)
    check_answers(engine.generate(ask()), ask(), version=2)


def test_when_an_update_fails_on_all_servers_it_is_made_again_from_resend(
    build, processes, weights
):
    engine = build(processes=processes)
    engine.resend = lambda: iter(weights)
    for process in processes:
        process.server.broken = fails_at("/update_weights", (500, b"boom"))
    engine.load_weights(weights, version=1)
    assert [process.starts for process in processes] == [2, 2]
    check_answers(engine.generate(ask()), ask(), version=1)
    assert engine.policy_version == 1


# ---- several ranks


def test_every_rank_gets_its_own_answers_and_the_servers_share_the_work(build, servers, weights):
    def work(ranks):
        engine = build(ranks, servers=servers)
        engine.load_weights(weights, version=4)
        requests = [
            Request(
                prompt_ids=(2 + i + 18 * ranks.rank, 3),
                params=SamplingParams(n=2, max_new_tokens=4, seed=0),
            )
            for i in range(15)
        ]
        check_answers(engine.generate(requests), requests, version=4)
        return numbers(engine)

    for server in servers:
        server.prompts.clear()
    assert Threads(2).run(work) == [NOTHING, NOTHING]
    # One more each: the first token at the start.
    assert [len(server.prompts) for server in servers] == [11, 11, 11]
    assert all(server.calls.count("/start_weight_update") == 1 for server in servers)


def test_ranks_share_the_room_of_a_server(build, servers):
    servers[0].seconds = 0.05

    def work(ranks):
        engine = build(ranks, servers=servers[:1], max_num_seqs=4)
        check_answers(engine.generate(ask(12, n=1)), ask(12, n=1), version=0)

    assert Threads(2).run(work) == [None, None]
    assert servers[0].most_at_once == 8


def test_ranks_with_one_request_each_do_not_all_ask_the_same_server(build, servers):
    def work(ranks):
        engine = build(ranks, servers=servers)
        if ranks.is_main:
            for server in servers:
                server.prompts.clear()
        ranks.gather(None)
        return engine.generate(ask(1))

    Threads(3).run(work)
    assert [len(server.prompts) for server in servers] == [1, 1, 1]


def test_every_rank_reads_the_whole_stream_whatever_happens_on_the_first(build, servers, weights):
    def work(ranks):
        engine = build(ranks, servers=servers)
        ranks.gather(None)
        if ranks.is_main:
            for server in servers:
                server.broken = fails_at("/update_weights", (500, b"boom"))
        read = []

        def stream():
            for name, tensor in weights:
                read.append(ranks.gather(name))  # gathering a shard is a collective
                yield name, tensor

        with pytest.raises(EngineError, match="HTTP 500: boom"):
            engine.load_weights(stream(), version=1)
        return read

    expected = [[name, name] for name, _ in weights]
    assert Threads(2).run(work) == [expected, expected]


def test_a_failure_of_the_sender_is_told_to_all_ranks(build, servers, weights):
    class Full(FakeSender):
        def buckets(self, stream):
            next(stream)
            raise OSError("no space left on /dev/shm")
            yield

    def work(ranks):
        engine = build(ranks, servers=servers, sender=Full)
        engine.load_weights(weights, version=1)

    errors = Threads(2).run(work)
    assert all(isinstance(error, EngineError) for error in errors)
    assert "no space left" in str(errors[0])
    assert "rank 0: " in str(errors[1])
    assert "no space left" in str(errors[1])


def test_an_error_of_one_rank_ends_generate_on_all(build, servers):
    def work(ranks):
        engine = build(ranks, servers=servers)
        engine.generate(ask(max_new_tokens=1000 if ranks.rank == 1 else 4))

    first, second = Threads(2).run(work)
    assert "limit is 128" in str(second)
    assert str(first) == f"rank 1: {second}"


def test_a_rank_without_requests_takes_part_in_a_recovery(build, processes, weights):
    def work(ranks):
        engine = build(ranks, processes=processes)
        engine.load_weights(weights, version=1)
        engine.resend = lambda: iter(weights)
        if ranks.is_main:
            for process in processes:
                process.server.kill()
        ranks.gather(None)
        requests = ask(6) if ranks.rank == 1 else []
        check_answers(engine.generate(requests), requests, version=1)
        return numbers(engine)

    first, second = Threads(2).run(work)
    assert (first["server_failures"], first["server_restarts"]) == (2, 2)
    assert second["server_failures"] == second["server_restarts"] == 0
    assert second["retried_requests"] > 0


def test_ranks_agree_on_who_is_lost(build, processes, weights):
    """Only rank 1 notices, as only it asks; the next update goes to both servers, and rank 0 asks both."""

    def work(ranks):
        engine = build(ranks, processes=processes)
        engine.load_weights(weights, version=1)
        if ranks.is_main:
            processes[0].server.kill()
        ranks.gather(None)
        requests = ask(6) if ranks.rank == 1 else []
        check_answers(engine.generate(requests), requests, version=1)
        living = [server.living for server in engine._servers]
        engine.load_weights(weights, version=2)
        check_answers(engine.generate(ask(8)), ask(8), version=2)
        return living

    assert Threads(2).run(work) == [[False, True], [False, True]]


def test_a_failed_start_is_told_to_all_ranks_and_leaves_no_process(build, processes):
    processes[1].server.facts["model_config"]["model"] = "another"

    def work(ranks):
        build(ranks, processes=processes)

    errors = Threads(2).run(work)
    assert all("model 'another'" in str(error) for error in errors)
    assert all(process.server._http is None for process in processes)


# ---- the start


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError])
def test_a_start_that_is_broken_off_leaves_no_process(trouble, build, processes):
    def broken_off():
        raise trouble

    processes[1].start = broken_off
    with pytest.raises(trouble):
        build(processes=processes)
    assert processes[0].starts == 1
    assert all(process.closes and process.server._http is None for process in processes)


def test_a_server_that_is_not_there_is_named(build, servers):
    servers[1].kill()
    with pytest.raises(
        EngineError, match=f"no vLLM server at {servers[1].url} within .*llmac serve"
    ):
        build(servers=servers, seconds=0.3)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model": "/elsewhere/another"}, "has model 'another'; this run needs 'model'"),
        ({"max_model_len": 64}, "max_model_len 64, the one at .* has 128"),
        ({"dtype": "torch.bfloat16"}, r"dtype torch\.bfloat16, the one at .* has torch\.float32"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs-mode 'raw_logprobs'"),
        ({"backend": None}, "weight transfer backend None; this run needs 'fake'"),
        ({"backend": {"backend": "nccl"}}, "backend 'nccl'"),
    ],
)
def test_servers_of_the_wrong_kind_are_refused(facts, said, build, servers):
    odd = FakeServer(**facts)
    with pytest.raises(EngineError, match=said):
        build(servers=[servers[0], odd])
    odd.kill()


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/server_info", (404, {"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1"),
        (
            GENERATE,
            (400, {"error": {"message": "Token id 39 is out of vocabulary"}}),
            "token 39.*Token id",
        ),
        (
            "/init_weight_transfer_engine",
            (500, b"no backend"),
            "cannot be sent weights.*no backend",
        ),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_at_the_start(path, answer, said, build, servers):
    servers[2].broken = fails_at(path, answer)
    with pytest.raises(EngineError, match=f"{servers[2].url}.*{said}"):
        build(servers=servers)


def test_what_is_no_url_is_refused(build, checkpoint, tokenizer):
    with pytest.raises(ConfigError, match=r"rollout\.servers has 'host:8000'"):
        VLLMServerEngine(
            str(checkpoint), tokenizer, OneRank(), sender=FakeSender, servers=["host:8000"]
        )


def test_a_look_at_health_is_short():
    assert server_pool.LOOK_SECONDS <= 10
