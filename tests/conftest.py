"""Shapes and types of core and algorithms are checked while tests run; documentation examples find torch."""

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
