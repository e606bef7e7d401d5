"""`accelerate launch --num_machines 2`, really started on two hosts that share nothing but a folder and a cable."""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.two_hosts.namespaces import two_hosts

ROOT = Path(__file__).parents[3]
PORT = "29500"

pytestmark = pytest.mark.slow

REWARD = '''
import json, os, pathlib, socket

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
where = {name: os.environ[name] for name in VARIABLES} | {"host": socket.gethostname()}
(pathlib.Path(__file__).parent / f"rank-{where['RANK']}.json").write_text(json.dumps(where))


def reward(prompt, response, wanted):
    """Fraction of the response's characters that are the wanted one."""
    return response.count(wanted) / max(len(response), 1)
'''


@pytest.fixture
def hosts(tmp_path):
    """Two hosts for one test; whatever still runs on them ends with it."""
    with two_hosts(tmp_path) as pair:
        yield pair


@pytest.fixture(scope="module", autouse=True)
def _hosts_are_possible(tmp_path_factory):
    try:
        with two_hosts(tmp_path_factory.mktemp("probe")):
            pass
    except RuntimeError as error:
        pytest.skip(f"no two hosts: {error}")


@pytest.fixture
def settings(settings, tmp_path):
    """Three steps, with a reward function that leaves a note of where each rank ran."""
    (tmp_path / "reward.py").write_text(REWARD)
    settings["reward"] = f"{tmp_path / 'reward.py'}:reward"
    settings["run"] |= {"steps": 3, "save_every": 3}
    return settings


class Job:
    """The same `accelerate launch` on each host, as the README has it, with its machine rank."""

    def __init__(self, hosts, folder, recipe, *overrides, config="ddp.yaml", environment=None):
        self.logs = [folder / f"{host.name}.log" for host in hosts]
        self.launchers = []
        for machine, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", f"recipes/accelerate/{config}"]
            command += ["--num_machines", "2", "--num_processes", "2"]
            command += ["--machine_rank", str(machine)]
            command += ["--main_process_ip", hosts[0].address, "--main_process_port", PORT]
            self.launchers.append(
                host.start(
                    [*command, "recipes/train.py", str(recipe), *overrides],
                    folder=ROOT,
                    environment={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        "CUDA_VISIBLE_DEVICES": "",
                        "HF_HUB_OFFLINE": "1",
                        **(environment or {}),
                    },
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


@pytest.fixture
def launch(hosts, tmp_path):
    """Starts `Job`s on both hosts and waits for none of them in the end."""
    started = []

    def start(*arguments, **options):
        started.append(Job(hosts, tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for job in started:
        job.end()


def test_two_hosts_train_like_two_processes_of_one(
    hosts, launch, settings, write_recipe, run, read_metrics, tmp_path
):
    """Hosts whose names resolve need no variable at all."""
    recipe = write_recipe(settings)
    job = launch(recipe)
    assert job.finish() == [0, 0], job.printed()

    for rank, host in enumerate(hosts):
        where = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert where == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts[0].address,
            "host": host.name,
        }
    assert [text.count("step 3/3") for text in job.printed()] == [1, 0], "one rank reports"

    code, printed = run(recipe, f"run.output={tmp_path / 'one_host'}", processes=2).finish()
    assert code == 0, printed
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines == read_metrics(tmp_path / "one_host")
    ours, theirs = (
        load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "one_host")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("whole_host", [False, True], ids=["the rank", "its whole host"])
def test_when_a_rank_of_one_host_dies_the_other_host_ends_too(
    whole_host, hosts, launch, settings, write_recipe, tmp_path
):
    settings["run"] |= {"steps": 10_000, "save_every": 10_000}
    job = launch(write_recipe(settings))
    job.wait_for('"step": 2', tmp_path / "run/metrics.jsonl")
    if whole_host:
        hosts[1].power_off()
    else:
        job.rank_on(1).kill()
    since = time.monotonic()
    codes = job.finish(seconds=60)
    assert 0 not in codes, job.printed()
    assert time.monotonic() - since < 30, "the other host waited for the dead one"
    assert not (tmp_path / "run/final").exists()
