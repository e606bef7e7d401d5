"""Processes that stand for a server: watched, killed, started anew, and gone when this process is. No vLLM here."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from llmac.cli import main
from llmac.config import load_recipe
from llmac.engines.vllm_launch import (
    ServerProcess,
    check_port,
    free_port,
    server_command,
    server_environment,
)
from llmac.engines.weight_memory import SharedMemoryReader
from llmac.engines.weight_socket import WeightSocketReader
from llmac.errors import EngineError
from llmac.serve import command_of, local_servers, sender_of

HEALTHY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
subprocess.Popen(["sleep", "600"])  # as vLLM starts its engine
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def process(tmp_path):
    """`process(code)`: a server whose main process runs the code."""
    made = []

    def make(code, port=None):
        port = port or free_port()
        command = [sys.executable, "-u", "-c", code, str(port)]
        made.append(ServerProcess(command, port=port, log=tmp_path / "logs" / "server.log"))
        return made[-1]

    yield make
    for server in made:
        server.close()
        server.close()


def group(pid):
    """All processes of a process group that still run."""
    found = set()
    for each in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(each.pid) == pid and each.info["status"] != psutil.STATUS_ZOMBIE:
                found.add(each.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def all_gone(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while group(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group(pid)


def test_a_server_is_ready_when_it_is_healthy_and_leaves_nothing_behind(process):
    server = process(HEALTHY)
    assert (server.alive, server.pid) == (False, None)
    server.start()
    server.wait_ready(20)
    own_group = os.getpgid(server.pid)
    assert server.alive
    assert own_group != os.getpgid(0)
    assert len(group(own_group)) == 3, "the server, what it started, and the guard"
    server.close()
    assert not server.alive
    assert all_gone(own_group)


def test_a_killed_server_starts_anew_at_the_same_url(process):
    server = process(HEALTHY)
    server.start()
    server.wait_ready(20)
    url, pid, own_group = server.url, server.pid, os.getpgid(server.pid)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.alive
    server.restart()
    server.wait_ready(20)
    assert server.url == url
    assert server.pid != pid
    assert all_gone(own_group), "what the dead server had started"


def test_a_stopped_server_is_killed_too(process):
    server = process(HEALTHY)
    server.start()
    server.wait_ready(20)
    own_group = os.getpgid(server.pid)
    os.killpg(own_group, signal.SIGSTOP)
    started = time.monotonic()
    server.kill()
    assert time.monotonic() - started < 5
    assert all_gone(own_group)


def test_no_server_outlives_a_trainer_that_is_killed(tmp_path):
    """`kill -9` of the trainer: no handler runs, and the thread that started the server has long ended."""
    code = f"""
import sys, threading, time
from llmac.engines.vllm_launch import ServerProcess, free_port
port = free_port()
server = ServerProcess([sys.executable, "-c", {HEALTHY!r}, str(port)], port=port, log={str(tmp_path / "log")!r})
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
server.wait_ready(20)
print(server.pid, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    own_group = os.getpgid(pid)
    assert len(group(own_group)) == 3
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert all_gone(own_group)


def test_a_server_that_dies_at_the_start_is_reported_at_once_with_its_last_words(process):
    server = process("import sys; print('the weights are cursed'); sys.exit(3)")
    server.start()
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 3.*the weights are cursed"):
        server.wait_ready(60)
    assert time.monotonic() - started < 10


def test_too_little_memory_names_the_knobs(process):
    server = process("raise ValueError('4.0 GiB KV cache is needed, which is larger than 0.1 GiB')")
    server.start()
    with pytest.raises(EngineError, match=r"lower rollout\.max_model_len or rollout\.max_num_seqs"):
        server.wait_ready(60)


def test_the_first_error_of_the_last_start_is_the_cause(process):
    """vLLM's server dies of its engine's death, and what its engine died of is said many lines before."""
    code = """
import sys
print("(APIServer pid=6) WARNING 11-21 [a.py:1] This can cause errors like `OSError: [Errno 24]`")
print("(EngineCore pid=7) ERROR 11-21 [core.py:1] ValueError: 4 GiB KV cache is needed")
for _ in range(50):
    print("leaked memory objects")
sys.exit("RuntimeError: Engine core initialization failed. See root cause above")
"""
    server = process("print('KeyError: of the start before')")
    server.start()
    with pytest.raises(EngineError, match="KeyError: of the start before"):
        server.wait_ready(60)
    again = ServerProcess([sys.executable, "-c", code], port=free_port(), log=server.log)
    again.start()
    with pytest.raises(EngineError, match=r"code 1: ValueError: 4 GiB KV cache is needed; lower"):
        again.wait_ready(60)
    again.close()


def test_a_server_that_the_kernel_kills_names_the_knobs(process):
    server = process("import os; os.kill(os.getpid(), 9)")
    server.start()
    with pytest.raises(EngineError, match=r"exit code -9.* lower rollout\.max_model_len"):
        server.wait_ready(60)


def test_other_last_words_name_no_knobs(process):
    server = process("print('leaked shared_memory objects'); raise ValueError('no such model')")
    server.start()
    with pytest.raises(EngineError) as failure:
        server.wait_ready(60)
    assert "rollout.max_model_len" not in str(failure.value)


def test_a_server_that_does_not_get_ready_is_given_up(process):
    server = process("import time; print('still loading'); time.sleep(600)")
    server.start()
    with pytest.raises(EngineError, match=r"(?s)is not ready after 1.5 s.*still loading"):
        server.wait_ready(1.5)


def test_a_taken_port_is_told_before_anything_starts(process):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = process(HEALTHY, port=port)
        with pytest.raises(EngineError, match="End what listens there, or choose another port"):
            server.start()
        assert not server.alive
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("trouble", ["log", "command"])
def test_a_start_that_fails_half_way_leaves_no_guard(trouble, tmp_path):
    log = tmp_path if trouble == "log" else tmp_path / "log"  # a folder cannot be written to
    server = ServerProcess([str(tmp_path / "nowhere")], port=free_port(), log=log)
    with pytest.raises(OSError, match=str(tmp_path)):
        server.start()
    assert server._guard is not None
    guard = server._guard.pid
    server.close()
    assert server._guard is None
    assert all_gone(guard)


def test_a_server_that_was_never_started_is_not_ready(process):
    with pytest.raises(EngineError, match="has not been started"):
        process(HEALTHY).wait_ready(60)


def test_the_health_of_somebody_else_on_the_port_does_not_count(process):
    """Two servers race for a port: the one that lost it has died, although the port answers."""
    winner = process(HEALTHY)
    winner.start()
    winner.wait_ready(20)
    loser = ServerProcess(["false"], port=int(winner.url.rsplit(":", 1)[1]), log=winner.log)
    loser._server = subprocess.Popen(["false"])
    loser._server.wait()
    with pytest.raises(EngineError, match="ended with exit code 1"):
        loser.wait_ready(5)


def test_a_server_is_no_rank_of_the_job_that_starts_it(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "/cache")
    environment = server_environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(
        environment
    )
    assert environment["HF_HOME"] == "/cache"
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_the_gpus_of_a_server_are_counted_among_those_of_the_trainer(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert server_environment([4, 5])["CUDA_VISIBLE_DEVICES"] == "4,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    assert server_environment([1, 2])["CUDA_VISIBLE_DEVICES"] == "3,6"
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == "2,3,6,7"


def test_the_command_says_what_the_recipe_says():
    recipe = load_recipe(
        "recipes/gsm8k_grpo.yaml",
        [
            "model.name=some/model",
            "model.tokenizer=other/tokenizer",
            "rollout.engine=vllm_server",
            "rollout.max_model_len=777",
            "rollout.tensor_parallel_size=2",
            "rollout.kv_cache_mb=3",
            "rollout.dtype=float16",
        ],
    )
    words = command_of(recipe, host="h", port=5, more=["--data-parallel-size", "4"])
    told = dict(itertools.pairwise(words))
    assert "some/model" in words
    expected = {
        "--tokenizer": "other/tokenizer",
        "--host": "h",
        "--port": "5",
        "--max-model-len": "777",
        "--tensor-parallel-size": "2",
        "--kv-cache-memory-bytes": str(3 << 20),
        "--dtype": "float16",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--data-parallel-size": "4",
    }
    assert {name: told[name] for name in expected} == expected


def test_precision_is_the_trainers_unless_the_recipe_says_otherwise():
    def dtype(*overrides):
        recipe = load_recipe("recipes/gsm8k_grpo.yaml", ["rollout.engine=vllm_server", *overrides])
        words = command_of(recipe, host="h", port=5)
        return words[words.index("--dtype") + 1]

    assert dtype("model.dtype=float32", "model.compute_dtype=null") == "float32"
    assert dtype("model.dtype=float32", "model.compute_dtype=bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("overrides", "kind", "reader"),
    [
        ([], "shm", SharedMemoryReader),
        (["rollout.servers=[http://localhost:1]"], "shm", SharedMemoryReader),
        (["rollout.servers=[http://192.0.2.7:1]"], "tcp", None),
        (["rollout.weight_transport=tcp"], "tcp", WeightSocketReader),
    ],
)
def test_weights_go_through_memory_on_one_machine_and_through_a_socket_else(
    overrides, kind, reader
):
    recipe = load_recipe("recipes/gsm8k_grpo.yaml", ["rollout.engine=vllm_server", *overrides])
    try:
        sender = sender_of(recipe)
    except EngineError as error:  # a machine without any network
        pytest.skip(str(error))
    info = sender.init_info()
    assert (sender.backend, info["transport"]) == ("llmac", kind)
    if reader is None:
        assert info["introduction"]["host"] != "127.0.0.1"
    else:
        reader(info["introduction"]).close()
    sender.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes as many GPUs as there are servers")
def test_local_servers_have_a_port_and_a_log_each(tmp_path):
    recipe = load_recipe(
        "recipes/gsm8k_grpo.yaml", ["rollout.engine=vllm_server", "rollout.server_count=3"]
    )
    servers = local_servers(recipe, tmp_path, first_gpu=0)
    assert len({server.url for server in servers}) == len({server.log for server in servers}) == 3


def test_a_tokenizer_is_named_only_if_it_is_another():
    assert "--tokenizer" not in server_command("some/model")


def test_serving_a_model_that_is_not_there_is_told_at_once(capsys):
    assert main(["serve", "recipes/gsm8k_grpo.yaml", "model.name=./nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_serving_on_a_taken_port_is_told_at_once(capsys, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        where = ["--host", "127.0.0.1", "--port", port]
        assert main(["serve", "recipes/gsm8k_grpo.yaml", f"model.name={tmp_path}", *where]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
