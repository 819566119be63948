"""Which tests a run holds, in which order, and under which schedule seed device code runs."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SEED = "GEMMA_EXT_SCHEDULE_SEED"
# what one process of a parallel run keeps: groups of ranks, the persistent build folder
TOGETHER = ("distributed", "packaging")


def commit_seed() -> int:
    """A number that every commit changes; 9 outside of git, which the fixed seeds leave out."""
    command = ["git", "-C", HERE, "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 9
    return int(found.stdout[:8], 16)


# processes that tests start take it over
os.environ.setdefault(SEED, str(commit_seed()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests marked exhaustive")


def pytest_report_header() -> str:
    return f"schedule seed: {os.environ[SEED]} ({SEED})"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
        for item in items:
            _group(item)


def _group(item: pytest.Item) -> None:
    """The slow tests of a module stay together too: some need gigabytes."""
    folder = item.path.relative_to(HERE).parts[0]
    if folder in TOGETHER:
        item.add_marker(pytest.mark.xdist_group(folder))
    elif item.get_closest_marker("slow"):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
