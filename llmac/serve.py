"""vLLM servers as a recipe describes them: `llmac serve` on a machine of their own, or started by the run itself."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch

from llmac.config.effects import given
from llmac.config.schema import Recipe
from llmac.engines.server_session import Sender
from llmac.engines.vllm_launch import (
    ServerProcess,
    check_port,
    free_port,
    server_command,
    server_environment,
)
from llmac.engines.vllm_nccl import NCCLWeightSender
from llmac.engines.weight_sender import WeightSender, transport_for
from llmac.engines.weight_socket import host_towards
from llmac.errors import ConfigError
from llmac.models.loading import context_length


def serve(recipe: Recipe, *, host: str, port: int, more: Sequence[str] = ()) -> NoReturn:
    """Become the server the recipe describes, for a trainer elsewhere to feed; says where it will be found.

    Args:
        recipe: its `model` and `rollout` sections count; take the file the trainer takes, with the same overrides.
        host: address to listen on; 0.0.0.0 for all of this machine's.
        port: to listen on.
        more: further arguments of `vllm serve`.

    Raises:
        ConfigError: the model cannot be found.
        EngineError: the port is taken.
    """
    context_length(
        recipe.model
    )  # reads the model's configuration, and says what is wrong if it cannot
    check_port(host, port)
    command = command_of(recipe, host=host, port=port, more=more)
    outside = socket.gethostname() if host in ("0.0.0.0", "::") else host
    print(
        f"rollout.engine=vllm_server rollout.servers=[http://{outside}:{port}]\n"
        "These are the overrides for the trainer; the server is ready when it answers /health. Whoever reaches it can "
        "change its weights: keep it to a network you trust.",
        flush=True,
    )
    os.execve(command[0], command, server_environment())


def local_servers(
    recipe: Recipe, folder: Path, *, first_gpu: int, longest: int | None = None
) -> list[ServerProcess]:
    """The `rollout.server_count` servers a run starts on its own machine, not started yet.

    Args:
        recipe: of the run.
        folder: for their logs.
        first_gpu: the first that no training process of this machine uses; without GPUs it does not matter.
        longest: tokens of the longest prompt and response of the run, the servers' context unless the recipe has one.

    Raises:
        ConfigError: there are not enough GPUs.
    """
    rollout = recipe.rollout
    count, wide = rollout.server_count, rollout.tensor_parallel_size
    gpus = torch.cuda.device_count()
    if gpus and first_gpu + count * wide > gpus:
        raise ConfigError(
            f"rollout.server_count={count} servers of rollout.tensor_parallel_size={wide} need {count * wide} GPUs "
            f"besides the {first_gpu} that train; this machine has {gpus}. Train with fewer processes, start fewer "
            "servers, or share GPUs with rollout.engine=vllm"
        )
    servers = []
    for place in range(count):
        port = free_port()
        first = first_gpu + place * wide
        servers.append(
            ServerProcess(
                command_of(recipe, host="127.0.0.1", port=port, longest=longest),
                port=port,
                log=folder / f"vllm_server_{place}.log",
                environment=server_environment(range(first, first + wide) if gpus else None),
            )
        )
    return servers


def sender_of(recipe: Recipe) -> Sender:
    """What sends the run's weights to its servers, as `rollout.weight_transport` says.

    Raises:
        EngineError: no way leads from this machine to the first of `rollout.servers`.
    """
    rollout = recipe.rollout
    bucket_bytes = rollout.sync_bucket_mb << 20
    transport = rollout.weight_transport
    if transport == "auto":
        transport = transport_for(rollout.servers)
    if transport == "shm":
        return WeightSender("shm", bucket_bytes)
    # Where the servers see this machine: as seen from the first of them.
    address = urlsplit(rollout.servers[0]).hostname if rollout.servers else None
    host = host_towards(address or "127.0.0.1")
    if transport == "tcp":
        return WeightSender("tcp", bucket_bytes, host=host)
    return NCCLWeightSender(bucket_bytes, host=host, workers=rollout.tensor_parallel_size)


def gpu_share(recipe: Recipe) -> float:
    """Fraction of its GPU that a server takes: the recipe's, else nearly all, as nobody trains there."""
    wanted = given(recipe, "rollout.gpu_memory_utilization")
    return recipe.rollout.gpu_memory_utilization if wanted else 0.9


def command_of(
    recipe: Recipe, *, host: str, port: int, longest: int | None = None, more: Sequence[str] = ()
) -> list[str]:
    """The command of one server of the recipe."""
    spec, rollout = recipe.model, recipe.rollout
    backend = "nccl" if rollout.weight_transport == "nccl" else WeightSender.backend
    return server_command(
        spec.name,
        host=host,
        port=port,
        tokenizer=spec.tokenizer,
        dtype=(spec.compute_dtype or spec.dtype) if rollout.dtype == "auto" else rollout.dtype,
        max_model_len=rollout.max_model_len or longest,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=gpu_share(recipe),
        kv_cache_mb=rollout.kv_cache_mb,
        enforce_eager=rollout.enforce_eager,
        trust_remote_code=spec.trust_remote_code,
        revision=spec.revision,
        backend=backend,
        more=more,
    )
