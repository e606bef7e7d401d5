"""Whether a `vllm serve` is one that llmac can use: there, in development mode, of the right model, fed as we feed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmac.engines.server_protocol import GENERATE, decoded, message_of, tls
from llmac.errors import ConfigError, EngineError

START_IT = "start it with `llmac serve <recipe>`"
LOOK_SECONDS = 10.0
FIRST_ANSWER_SECONDS = 120.0
"""Longest wait for the first token of a server and for its description of itself."""
SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says about itself."""

    model: str
    max_model_len: int
    dtype: str
    logprobs_mode: str
    backend: str | None
    """Of weight transfer; None: it takes no weights."""

    @classmethod
    def of(cls, url: str) -> "ServerFacts":
        """Ask the server at `url`.

        Raises:
            EngineError: it does not tell, which only happens outside of development mode.
        """
        path = "/server_info?config_format=json"
        try:
            response = httpx.get(
                url + path, timeout=FIRST_ANSWER_SECONDS, verify=tls(), trust_env=False
            )
        except httpx.TransportError as error:
            raise EngineError(
                f"{url} does not answer {path}: {type(error).__name__}: {error}"
            ) from error
        try:
            found = decoded(response)["vllm_config"]
            transfer = found["weight_transfer_config"]
            return cls(
                model=found["model_config"]["model"],
                max_model_len=found["model_config"]["max_model_len"],
                dtype=found["model_config"]["dtype"],
                logprobs_mode=found["model_config"]["logprobs_mode"],
                backend=transfer and transfer["backend"],
            )
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"{url} does not describe itself: HTTP {response.status_code} from {path}; expected `vllm serve` 0.32 "
                f"with VLLM_SERVER_DEV_MODE=1, without which weights cannot be sent. Stop it and {START_IT}"
            ) from error


def checked_url(server: str) -> str:
    """The URL without a slash at the end.

    Raises:
        ConfigError: it is none.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"rollout.servers has {server!r}, which is not a URL; expected something like http://host:8000"
        )
    return server.rstrip("/")


def wait_until_healthy(url: str, seconds: float) -> None:
    """Return as soon as the server at `url` answers `/health`.

    Raises:
        EngineError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while (problem := health_problem(url)) is not None:
        if time.monotonic() >= deadline:
            raise EngineError(
                f"no vLLM server at {url} within {seconds:g} s ({problem}); {START_IT} and wait until it says that it "
                "is ready, or correct rollout.servers"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def health_problem(url: str) -> str | None:
    """Why the server at `url` is not healthy right now; None if it is."""
    try:
        response = httpx.get(url + "/health", timeout=LOOK_SECONDS, verify=tls(), trust_env=False)
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    return None if response.status_code == 200 else f"HTTP {response.status_code} from /health"


def check_alike(servers: Mapping[str, ServerFacts], *, model: str, backend: str) -> None:
    """Refuse servers that are not of one kind, or not of the kind this run needs; the message names them.

    Args:
        servers: facts by URL.
        model: the checkpoint that is trained; a folder may lie elsewhere on another host, so its own name counts.
        backend: of weight transfer, as the sender needs it.
    """
    for url, facts in servers.items():
        wanted: list[tuple[str, Any, Any]] = [
            ("model", PurePath(facts.model).name, PurePath(model).name),
            ("weight transfer backend", facts.backend, backend),
            ("logprobs-mode", facts.logprobs_mode, "processed_logprobs"),
        ]
        for what, found, expected in wanted:
            if found != expected:
                raise EngineError(
                    f"the server at {url} has {what} {found!r}; this run needs {expected!r}. Stop it and {START_IT}"
                )
    first_url, first = next(iter(servers.items()))
    for url, facts in servers.items():
        for what in ("dtype", "max_model_len"):
            # Two of the fields above, read by name to be told apart in the message.
            mine, theirs = getattr(facts, what), getattr(first, what)
            if mine != theirs:
                raise EngineError(
                    f"the server at {url} has {what} {mine}, the one at {first_url} has {theirs}; all servers of a run "
                    "serve alike, as each request may go to any of them. Start all from one recipe"
                )


def check_first_token(url: str, last_token: int) -> None:
    """Have the server read the last token of the vocabulary and sample one.

    Shapes that a kernel refuses (small heads on CPU) and a smaller vocabulary show only now; better than mid-run.

    Raises:
        EngineError: the server refuses or fails.
    """
    body = {"token_ids": [last_token], "sampling_params": {"max_tokens": 1, "temperature": 0.0}}
    try:
        response = httpx.post(
            url + GENERATE, json=body, timeout=FIRST_ANSWER_SECONDS, verify=tls(), trust_env=False
        )
        said = "" if response.status_code == 200 else message_of(decoded(response))
    except httpx.TransportError as error:
        said = f"{type(error).__name__}: {error}"
    if said:
        raise EngineError(
            f"the server at {url} does not sample from the token {last_token}, the last of the model's vocabulary: "
            f"{said.rstrip('.')}. {START_IT.capitalize()}; its log has the cause. A model that vLLM cannot compute "
            "needs rollout.engine=hf"
        )
