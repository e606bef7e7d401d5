"""`accelerate launch --num_machines 2`, really started on two hosts that share nothing but a folder and a cable."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.e2e.two_hosts.namespaces import two_hosts

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
REWARD = '''
import json, os, pathlib, socket

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
where = {name: os.environ[name] for name in VARIABLES}
(pathlib.Path(__file__).parent / socket.gethostname()).write_text(json.dumps(where))


def reward(prompt, response, wanted):
    """Fraction of the response's characters that are the wanted one."""
    return response.count(wanted) / max(len(response), 1)
'''
# What `srun` does for one task a node: the same command on each, with the task's number.
SRUN = """#!{python}
import os, subprocess, sys
nodes = {nodes}
command = sys.argv[1:]
while command[0].startswith("--"):
    option, _, value = command.pop(0).partition("=")
    if option == "--nodelist":
        nodes = {{name: nodes[name] for name in value.split(",")}}
tasks = [
    subprocess.Popen([*enter, *command], env={{**os.environ, "SLURM_PROCID": str(number)}})
    for number, enter in enumerate(nodes.values())
]
sys.exit(max(task.wait() for task in tasks))
"""

pytestmark = pytest.mark.slow


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


@pytest.fixture(scope="module", autouse=True)
def _hosts_are_possible(tmp_path_factory):
    try:
        with two_hosts(tmp_path_factory.mktemp("probe")):
            pass
    except RuntimeError as error:
        pytest.skip(f"no two hosts: {error}")


@pytest.fixture
def hosts(tmp_path):
    """Two hosts for one test, which know each other by name; whatever still runs on them ends with it."""
    with two_hosts(tmp_path) as pair:
        yield pair


@pytest.fixture(scope="module")
def recipe(vllm_home, home, tmp_path_factory):
    """Three steps, and a reward function that leaves a note of where each rank ran beside the recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "reward.py").write_text(REWARD)
    settings = {
        "model": {"name": str(vllm_home)},
        "data": {"name": str(home / "train.jsonl")},
        "reward": f"{folder / 'reward.py'}:reward",
        "algorithm": {"name": "grpo", "group_size": 4},
        "actor": {"lr": 3e-3, "prompts_per_step": 4, "minibatches": 2},
        "rollout": {"max_new_tokens": 8},
        "run": {"steps": 3, "save_every": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def one_host(recipe, tmp_path_factory):
    """The run folder that two processes of this machine leave."""
    output = tmp_path_factory.mktemp("one_host")
    subprocess.run(
        [
            *launcher("ddp.yaml", "--main_process_port", "0"),
            *("recipes/train.py", str(recipe), f"run.output={output}"),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        timeout=120,
    )
    return output


@pytest.fixture
def launch(hosts, recipe, tmp_path):
    """Starts `Job`s on both hosts and waits for none of them in the end."""
    started = []

    def start(*overrides):
        folder = tmp_path / "run"
        started.append(Job(hosts, tmp_path, [str(recipe), f"run.output={folder}", *overrides]))
        return started[-1]

    yield start
    for job in started:
        job.end()


def launcher(config, *options):
    """`accelerate launch` of two processes in all."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", f"recipes/accelerate/{config}", "--num_processes", "2", *options),
    ]


class Job:
    """The same command on each host, as the README has it, with its machine rank."""

    def __init__(self, hosts, folder, arguments):
        self.logs = [folder / f"{host.name}.log" for host in hosts]
        self.launchers = []
        for machine, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            command = launcher(
                "ddp.yaml",
                *("--num_machines", "2", "--machine_rank", str(machine)),
                *("--main_process_ip", hosts[0].address, "--main_process_port", "29500"),
            )
            self.launchers.append(
                host.start(
                    [*command, "recipes/train.py", *arguments],
                    folder=ROOT,
                    environment=ENVIRONMENT,
                    log=log,
                )
            )

    def wait_for(self, text, file, seconds=60):
        """Until the file of the run says it, or the job ends before, which is an error."""
        deadline = time.monotonic() + seconds
        while not (file.exists() and text in file.read_text()):
            over = any(launcher.poll() is not None for launcher in self.launchers)
            assert not over, self.printed()
            assert time.monotonic() < deadline, (f"{text} never came", self.printed())
            time.sleep(0.01)

    def finish(self, seconds=120):
        """The exit code on each host; a job that is not over by then is an error."""
        deadline = time.monotonic() + seconds
        return [
            launcher.wait(timeout=max(deadline - time.monotonic(), 0.1))
            for launcher in self.launchers
        ]

    def printed(self):
        """What was printed on each host."""
        return [log.read_text() for log in self.logs]

    def end(self):
        """Stop waiting; the processes on the hosts end with their hosts."""
        for launcher in self.launchers:
            launcher.kill()
            launcher.wait()

    def rank_on(self, machine):
        """The training process on that host."""
        (rank,) = [
            child
            for child in psutil.Process(self.launchers[machine].pid).children(recursive=True)
            if "recipes/train.py" in child.cmdline()
            and "accelerate.commands.launch" not in child.cmdline()
        ]
        return rank


def check_ranks(hosts, notes):
    """Each host ran one rank, numbered by its machine rank."""
    for rank, host in enumerate(hosts):
        assert json.loads((notes / host.name).read_text()) == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts[0].address,
        }


def final_weights(output):
    return load_file(output / "final/model.safetensors")


def slurm(script, nodes, recipe, folder, *overrides, variables=None):
    """Run a script of recipes/slurm with `srun` and `scontrol` played; its exit code and what it printed."""
    enters = {name: host.command([], folder=ROOT) for name, host in nodes.items()}
    played = {
        "srun": SRUN.format(python=sys.executable, nodes=enters),
        "scontrol": "\n".join(["#!/bin/sh", *(f"echo {name}" for name in nodes), ""]),
    }
    for name, text in played.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "slurm.log"
    # To a file, because servers that outlive the script would keep a pipe open.
    with log.open("w") as output:
        job = subprocess.run(
            [
                *("bash", f"recipes/slurm/{script}", str(recipe)),
                *(f"run.output={folder / 'run'}", *overrides),
            ],
            cwd=ROOT,
            env={
                **ENVIRONMENT,
                "PATH": f"{folder}:{ENVIRONMENT['PATH']}",
                "SLURM_NNODES": str(len(nodes)),
                "SLURM_JOB_NODELIST": "host-[a-b]",
                "SLURM_JOB_ID": "1",
                **(variables or {}),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=200,
        )
    return job.returncode, log.read_text()


def test_two_hosts_train_like_two_processes_of_one(
    hosts, launch, one_host, recipe, read_metrics, tmp_path
):
    """Hosts whose names lead to their addresses need no variable at all."""
    job = launch()
    assert job.finish() == [0, 0], job.printed()
    check_ranks(hosts, notes=recipe.parent)
    assert [text.count("step 3/3") for text in job.printed()] == [1, 0], "one rank reports"
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3], "one rank writes"
    assert lines == read_metrics(one_host)
    ours, theirs = final_weights(tmp_path / "run"), final_weights(one_host)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.deepspeed
@needs("deepspeed")
def test_the_slurm_script_trains_under_zero3_on_two_hosts(one_host, recipe, read_metrics, tmp_path):
    """The hosts take their own names for their loopback: gloo must find the interface that leads to the other."""
    with two_hosts(tmp_path, by_name=False) as hosts:
        # Not the names: the second host would look for the first one where each looks for itself.
        code, printed = slurm(
            "train.sbatch", {host.address: host for host in hosts}, recipe, tmp_path
        )
        assert code == 0, printed
        check_ranks(hosts, notes=recipe.parent)
    lines, theirs = read_metrics(tmp_path / "run"), read_metrics(one_host)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in ("actor/pg_loss", "actor/grad_norm", "reward/mean"):
        ours, reference = ([line[name] for line in run] for run in (lines, theirs))
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6), name
    weights = final_weights(tmp_path / "run")
    for name, weight in final_weights(one_host).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)


@pytest.mark.deepspeed
@pytest.mark.vllm
@needs("deepspeed")
@needs("vllm")
def test_a_trainer_on_one_host_feeds_a_vllm_server_on_the_other(
    hosts, vllm_home, recipe, read_metrics, tmp_path
):
    """Two ranks under ZeRO-3 on the first host; weights reach the second one through the cable or not at all."""
    overrides = ["rollout.weight_transport=tcp", "rollout.probe_every=1", "rollout.kv_cache_mb=64"]
    code, printed = slurm(
        "train_split.sbatch",
        {host.name: host for host in hosts},
        recipe,
        tmp_path,
        *overrides,
        variables={"SLURM_GPUS_ON_NODE": "2", "SERVER_NODES": "1"},
    )
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert max(line["actor/sampler_logprob_diff_max"] for line in lines) < 1e-3
    syncs, size = len(lines), (vllm_home / "model.safetensors").stat().st_size
    assert hosts[1].bytes_received() > syncs * size


@pytest.mark.parametrize("whole_host", [False, True], ids=["the rank", "its whole host"])
def test_when_a_rank_of_one_host_dies_the_other_host_ends_too(whole_host, hosts, launch, tmp_path):
    job = launch("run.steps=10000", "run.save_every=10000")
    job.wait_for('"step": 2', tmp_path / "run/metrics.jsonl")
    if whole_host:
        hosts[1].power_off()
    else:
        job.rank_on(1).kill()
    since = time.monotonic()
    codes = job.finish(seconds=60)
    assert 0 not in codes, job.printed()
    assert time.monotonic() - since < 30, "the other host waited for the dead one"
    assert "rank 1 (host-b, pid " in job.printed()[0], "the other host does not say which rank"
    assert not (tmp_path / "run/final").exists()
