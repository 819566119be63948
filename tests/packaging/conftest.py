"""Helpers of the packaging tests: the checkout, its build folder, and fresh interpreters."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_CUDA_LIBRARY = (ROOT / "gemma_ext" / "_C_cuda.so").is_file()
# builds that tests start are of the kind that is here
os.environ["GEMMA_EXT_CUDA"] = "ON" if HAS_CUDA_LIBRARY else "OFF"


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def build_dir() -> Path:
    """The persistent build folder that `make build` filled."""
    kind = "cuda" if HAS_CUDA_LIBRARY else "cpu"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{kind}"
    folder = Path(os.environ.get("GEMMA_EXT_BUILD_DIR", ROOT / "build" / tag))
    assert (folder / "build.ninja").is_file(), f"expected a build in {folder}: run `make build`"
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run code in a fresh interpreter, in an empty folder, with the checkout importable."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
