"""Shapes and types of core and algorithms are checked while tests run; documentation examples find torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["llmac.core", "llmac.algorithms"], "beartype.beartype")

import torch  # noqa: E402  (the hook must come before anything that may import llmac)

torch.set_num_threads(1)


class DoctestNames:
    """A plugin of its own: a fixture of this file would not reach examples outside `tests/`."""

    @pytest.fixture(autouse=True)
    def _torch_in_examples(self, doctest_namespace):
        doctest_namespace.update(torch=torch, Tensor=torch.Tensor)


def pytest_configure(config):
    config.pluginmanager.register(DoctestNames(), "llmac-doctest-names")


@pytest.fixture(scope="session")
def on_two_processes():
    """Runs a worker under torchrun on two CPU processes that talk through gloo; returns what they printed."""

    def run(*worker):
        root = Path(__file__).parents[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*launcher, "--nproc_per_node", "2", *map(str, worker)],
            cwd=root,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(root),
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    return run
