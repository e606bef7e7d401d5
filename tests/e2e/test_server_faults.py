"""Real `vllm serve` processes: what they sample, and what happens when they are killed, stopped or out of date.

The tests share two servers, as starting one takes long, and run in their order: each leaves both alive and fed.
"""

import importlib.util
import os
import signal
import threading
import time

import httpx
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmac.core.protocols import Request, SamplingParams
from llmac.engines.vllm_server import VLLMServerEngine
from llmac.errors import EngineError
from llmac.runtime.context import Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

VOCABULARY = 40
TIMEOUT_SECONDS = 60.0
"""Many times what any of these requests takes, also on a machine that does other things; a hang costs this long."""


@pytest.fixture(scope="module")
def tokenizer():
    """Without an end of sequence, so that every response has the length asked for."""
    words = {chr(ord("A") + i): i for i in range(VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="A"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="A")


def make_model(seed):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=VOCABULARY,
            max_position_embeddings=1024,
            initializer_range=0.15,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


class Job:
    """An engine over two servers of this machine, and what it was last given."""

    def __init__(self, folder, tokenizer):
        from llmac.engines.vllm_launch import ServerProcess, free_port, server_command
        from llmac.engines.weight_sender import WeightSender

        self.processes = []
        for place in range(2):
            port = free_port()
            command = server_command(
                str(folder), port=port, dtype="float32", max_num_seqs=64, kv_cache_mb=64
            )
            log = folder.parent / f"server{place}.log"
            self.processes.append(ServerProcess(command, port=port, log=log))
        self.groups = set()
        self.version = 0
        self.model = make_model(0)
        self.engine = VLLMServerEngine(
            str(folder),
            tokenizer,
            Runtime.create(seed=0, output=None),
            sender=lambda: WeightSender("shm", bucket_bytes=1 << 16),
            launch=lambda: self.processes,
            max_num_seqs=64,
            request_timeout_seconds=TIMEOUT_SECONDS,
        )
        self.engine.resend = lambda: self.model.named_parameters()
        self.note_processes()

    def note_processes(self):
        """Remember every process group that was ever started."""
        self.groups |= {os.getpgid(process.pid) for process in self.processes}

    def update(self, seed):
        """New weights for engine and reference; returns the reference."""
        self.model = make_model(seed)
        self.version += 1
        self.engine.load_weights(self.model.named_parameters(), self.version)
        return self.model

    def counted(self):
        self.note_processes()
        return {name: measure.value for name, measure in self.engine.metrics().items()}


@pytest.fixture(scope="module")
def job(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    make_model(0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = Job(folder, tokenizer)
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(7)
    return [
        tuple(torch.randint(2, VOCABULARY, (3 + i % 6,), generator=generator).tolist())
        for i in range(16)
    ]


def ask(prompts, **params):
    return [Request(prompt_ids=prompt, params=SamplingParams(**params)) for prompt in prompts]


@torch.no_grad()
def logprobs_of(model, prompt, response, temperature):
    """Log π of a response by one forward pass."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.double() / temperature).log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def check_greedy(job, prompts):
    """Greedy responses are those of the reference, and come from both servers."""
    answers = job.engine.generate(ask(prompts, temperature=0.0, max_new_tokens=12))
    for prompt, [completion] in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = job.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        assert completion.token_ids == tuple(expected[0, len(prompt) :].tolist())
        assert completion.policy_version == job.version
    for process in job.processes:
        label = httpx.get(process.url + "/weight_info", trust_env=False).json()["weight_version"]
        assert label.startswith(f"version {job.version}, ")


def check_whole(job, answers, requests):
    """Every request has all its responses, each of full length and with the reference's log-probabilities."""
    assert len(answers) == len(requests)
    for request, siblings in zip(requests, answers, strict=True):
        assert len(siblings) == request.params.n
        for completion in siblings:
            assert len(completion.token_ids) == request.params.max_new_tokens
            assert completion.policy_version == job.version
        first = siblings[0]
        expected = logprobs_of(job.model, request.prompt_ids, first.token_ids, 1.0)
        assert (torch.tensor(first.logprobs) - expected).abs().max() < 1e-3


def killed_at_work(process):
    """The thread that kills a server as soon as it samples."""

    def kill():
        while not busy(process):
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    return killer


def busy(process):
    """Whether somebody waits for an answer of the server."""
    connections = psutil.Process(process.pid).net_connections("tcp")
    return any(found.status == psutil.CONN_ESTABLISHED for found in connections)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_those_of_the_policy(temperature, job, prompts):
    model = job.update(seed=1)
    requests = ask(prompts, n=2, max_new_tokens=24, temperature=temperature, seed=5)
    largest = 0.0
    for request, siblings in zip(requests, job.engine.generate(requests), strict=True):
        for completion in siblings:
            expected = logprobs_of(
                model, request.prompt_ids, completion.token_ids, request.params.temperature
            )
            difference = (torch.tensor(completion.logprobs) - expected).abs().max()
            largest = max(largest, float(difference))
    assert largest < 1e-3


def test_seeds_repeat_and_siblings_differ(job, prompts):
    requests = ask([prompts[0]] * 4, n=4, max_new_tokens=12, seed=4)
    first, again = (
        [[c.token_ids for c in siblings] for siblings in job.engine.generate(requests)]
        for _ in range(2)
    )
    assert again == first
    assert len({tokens for siblings in first for tokens in siblings}) == 16


def test_greedy_responses_are_those_of_the_policy_after_each_update(job, prompts):
    for seed in (2, 3):
        job.update(seed)
        check_greedy(job, prompts)


def test_a_stop_string_ends_a_response_at_the_token_that_completes_it(job, tokenizer, prompts):
    [[free]] = job.engine.generate(ask(prompts[:1], temperature=0.0, max_new_tokens=12))
    stop = tokenizer.decode(free.token_ids[4:6])
    [[stopped]] = job.engine.generate(
        ask(prompts[:1], temperature=0.0, max_new_tokens=12, stop=(stop,))
    )
    text = tokenizer.decode(free.token_ids)
    assert tokenizer.decode(stopped.token_ids) == text[: text.index(stop) + len(stop)]


def test_a_refused_request_says_why(job):
    with pytest.raises(EngineError, match=r"refused a request with HTTP 400: .*999999"):
        job.engine.generate(ask([(999_999,)], max_new_tokens=2))


def test_a_server_somebody_else_updated_is_found_out(job, prompts):
    url = job.processes[1].url
    httpx.post(url + "/update_weight_version", json={"new_version": "theirs"}, trust_env=False)
    with pytest.raises(EngineError, match=f"{url} sampled with weights labelled 'theirs'"):
        job.engine.generate(ask(prompts, max_new_tokens=4))


def test_after_an_update_that_broke_off_a_complete_one_repairs_the_servers(job, prompts):
    half = list(make_model(4).named_parameters())[:9]
    with pytest.raises(EngineError, match="did not arrive"):
        job.engine.load_weights(iter(half), 99)
    with pytest.raises(EngineError, match="incomplete weights"):
        job.engine.generate(ask(prompts, max_new_tokens=4))
    job.update(seed=4)
    check_greedy(job, prompts)
    assert job.counted() == {
        "rollout/server_failures": 0,
        "rollout/server_restarts": 0,
        "rollout/retried_requests": 0,
    }


def test_when_one_of_two_servers_is_killed_the_other_answers_and_it_comes_back(job, prompts):
    requests = ask(prompts, n=2, max_new_tokens=300, seed=1)
    victim = job.processes[0].pid
    killer = killed_at_work(job.processes[0])
    answers = job.engine.generate(requests)
    killer.join()
    check_whole(job, answers, requests)
    counted = job.counted()
    assert counted["rollout/server_failures"] == 1
    assert counted["rollout/server_restarts"] == 1
    assert counted["rollout/retried_requests"] >= len(prompts) / 2
    job.processes[0].wait_ready(120)  # no update would wait for it, as the other server lives
    job.update(seed=5)
    check_greedy(job, prompts)
    assert job.processes[0].pid != victim


def test_when_one_is_killed_and_one_hangs_both_start_anew_and_get_the_weights_again(job, prompts):
    requests = ask(prompts, n=2, max_new_tokens=300, seed=2)
    killed, hanging = job.processes
    os.killpg(os.getpgid(hanging.pid), signal.SIGSTOP)
    killer = killed_at_work(killed)
    answers = job.engine.generate(requests)
    killer.join()
    check_whole(job, answers, requests)
    counted = job.counted()
    assert counted["rollout/server_failures"] == 2
    assert counted["rollout/server_restarts"] == 2
    assert counted["rollout/retried_requests"] >= len(prompts)
    check_greedy(job, prompts)


def test_close_leaves_no_process_behind(job):
    job.note_processes()
    job.engine.close()
    assert len(job.groups) == 5
    assert {group for group in map(group_of, psutil.pids()) if group in job.groups} == set()


def group_of(process):
    """The process group, unless the process is gone or only waits to be looked at."""
    try:
        alive = psutil.Process(process).status() != psutil.STATUS_ZOMBIE
        return os.getpgid(process) if alive else None
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
