"""Build driver: CMake and ninja compile, setuptools packages.

Environment: GEMMA_EXT_TORCH_DIR (torch package folder), GEMMA_EXT_BUILD_DIR (persistent build
folder), GEMMA_EXT_HOST=AUTO|ON|OFF (the pybind11 module), GEMMA_EXT_CUDA=AUTO|ON|OFF (the CUDA
kernels) and GEMMA_EXT_CUDA_ARCHS, GEMMA_EXT_VERBOSE=1, MAX_JOBS, CXX, CUDACXX, CUDA_HOME.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HOST_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OLDEST_CMAKE = (3, 28)  # as CMakeLists.txt asks
OLDEST_NINJA = (1, 10)
OLDEST_NVCC = (12, 9)  # the first that knows the targets 100f and 120f


def find_torch() -> tuple[Path, str]:
    """Folder and version of torch, found without importing it."""
    chosen = os.environ.get("GEMMA_EXT_TORCH_DIR")
    if chosen:
        folder = Path(chosen)
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "gemma_ext builds against an installed torch >= 2.10 and found none: install torch "
                "and run `pip install --no-build-isolation .`, or set GEMMA_EXT_TORCH_DIR to a "
                "torch package folder"
            )
        folder = Path(spec.origin).parent
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise SystemExit(f"expected torch >= 2.10 with its headers in {folder}, found none there")
    match = re.search(r"__version__\s*=\s*'([^']+)'", (folder / "version.py").read_text())
    return folder, match.group(1) if match else "unknown"


def tool_version(path: str) -> tuple[int, ...]:
    """What `path --version` says, () if it does not run."""
    try:
        text = subprocess.check_output([path, "--version"], text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ()
    match = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def find_tool(name: str, attribute: str, oldest: tuple[int, ...]) -> str:
    """A build tool from the folder its Python package names, or else from PATH."""
    path = None
    with contextlib.suppress(ImportError, AttributeError):
        path = shutil.which(name, path=getattr(importlib.import_module(name), attribute))
    path = path or shutil.which(name)
    found = tool_version(path) if path else ()
    if path is None or found < oldest:
        have = f"{path} is {'.'.join(map(str, found)) or 'broken'}" if path else "there is none"
        raise SystemExit(
            f"the build needs {name} >= {'.'.join(map(str, oldest))}, but {have}: "
            f"pip install {name}"
        )
    return path


def source_revision() -> str:
    """`git describe` of the checkout, or "unknown" outside one."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        return subprocess.check_output(
            command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def option(name: str) -> str:
    """AUTO, ON or OFF from the environment."""
    choice = os.environ.get(name, "AUTO").upper()
    if choice not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{name}: expected AUTO, ON or OFF, got {choice}")
    return choice


def wants_host() -> bool:
    """Whether _host is built: GEMMA_EXT_HOST, or by default whether Python's headers are here."""
    choice = option("GEMMA_EXT_HOST")
    found = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    found = found and importlib.util.find_spec("pybind11") is not None
    if choice == "ON" and not found:
        raise SystemExit("GEMMA_EXT_HOST=ON needs Python's headers and the package pybind11")
    return choice != "OFF" and found


def nvcc_version(nvcc: str) -> tuple[int, int] | None:
    """Version of a CUDA compiler, None if it does not run."""
    try:
        text = subprocess.check_output([nvcc, "--version"], text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def find_nvcc() -> tuple[str | None, str]:
    """A CUDA compiler that is new enough, or None and what is wrong."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which(f"{toolkit}/bin/nvcc")
    if nvcc is None:
        return None, "found no nvcc through CUDACXX, PATH and CUDA_HOME"
    version = nvcc_version(nvcc)
    if version is None:
        return None, f"{nvcc} does not run"
    if version < OLDEST_NVCC:
        oldest, found = (".".join(map(str, v)) for v in (OLDEST_NVCC, version))
        return None, f"{nvcc} is {found}, older than {oldest}"
    return os.path.abspath(nvcc), ""


@functools.cache
def cuda_compiler() -> tuple[str | None, str]:
    """The nvcc that builds _C_cuda, or None and why it is left out."""
    choice = option("GEMMA_EXT_CUDA")
    if choice == "OFF":
        return None, ""
    nvcc, problem = find_nvcc()
    if nvcc is None and choice == "ON":
        raise SystemExit(
            f"GEMMA_EXT_CUDA=ON needs a CUDA compiler, but {problem}: install the CUDA toolkit "
            "or set GEMMA_EXT_CUDA=OFF"
        )
    if nvcc and not any(ROOT.glob("csrc/*/cuda_ops.cpp")):
        return None, "these sources have no CUDA kernels"
    return nvcc, problem


def cached_nvcc(build: Path) -> str | None:
    """The nvcc that a build folder was configured with."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text() if cache.is_file() else ""
    match = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", text, re.MULTILINE)
    return match.group(1) if match else None


def library_names() -> list[str]:
    """What is built: `_C`, and the other two where they are wanted."""
    cuda = ["_C_cuda"] if cuda_compiler()[0] else []
    return ["_C", *cuda, *(["_host"] if wants_host() else [])]


def job_count() -> int:
    """MAX_JOBS, or one job per core as far as 1.5 GiB each beyond 3 GiB of free memory goes."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, int((free - 3) / 1.5)))


def install_file(source: Path, target: Path) -> None:
    """Copy beside and rename: a process that has the old library mapped keeps it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, beside)
    os.replace(beside, target)


class CMakeBuild(build_ext):
    """Configure and build in a persistent folder, then place the libraries in the package."""

    def get_ext_filename(self, fullname: str) -> str:
        stem = fullname.rsplit(".", 1)[-1]
        suffix = HOST_SUFFIX if stem == "_host" else ".so"
        return str(Path("gemma_ext") / f"{stem}{suffix}")

    def run(self) -> None:
        torch_dir, torch_version = find_torch()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR", OLDEST_CMAKE)
        ninja = find_tool("ninja", "BIN_DIR", OLDEST_NINJA)
        nvcc, left_out = cuda_compiler()
        if left_out:
            print(f"gemma_ext: built without CUDA kernels: {left_out}", file=sys.stderr)
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{'cuda' if nvcc else 'cpu'}"
        build = Path(os.environ.get("GEMMA_EXT_BUILD_DIR", ROOT / "build" / tag))
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DGEMMA_EXT_TORCH_DIR={torch_dir}",
            f"-DGEMMA_EXT_TORCH_VERSION={torch_version}",
            f"-DGEMMA_EXT_VERSION={self.distribution.get_version()}",
            f"-DGEMMA_EXT_COMMIT={source_revision()}",
            f"-DGEMMA_EXT_HOST={'ON' if wants_host() else 'OFF'}",
            f"-DGEMMA_EXT_CUDA={'ON' if nvcc else 'OFF'}",
        ]  # fmt: skip
        if wants_host():
            import pybind11

            configure += [
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if cached_nvcc(build) not in (None, nvcc):
                configure.append("--fresh")  # on a new compiler CMake forgets the other settings
            archs = os.environ.get("GEMMA_EXT_CUDA_ARCHS")
            # without a list, one that an earlier build left in the cache must not stay
            configure.append(
                f"-DGEMMA_EXT_CUDA_ARCHS={archs}" if archs else "-UGEMMA_EXT_CUDA_ARCHS"
            )
        quiet = subprocess.DEVNULL if not os.environ.get("GEMMA_EXT_VERBOSE") else None
        command = [cmake, "--build", str(build), "-j", str(job_count())]
        command += ["--target", *library_names()]
        if os.environ.get("GEMMA_EXT_VERBOSE"):
            command.append("--verbose")
        # ninja keeps no lock of its own, and two builds in one folder corrupt it
        with open(build / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for step in (configure, command):
                if subprocess.call(step, stdout=quiet if step is configure else None):
                    raise SystemExit(f"the build failed in: {' '.join(step)}")

        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "gemma_ext" if inplace else Path(self.build_lib) / "gemma_ext"
        install_file(build / "build_info.json", package / "build_info.json")
        if not nvcc:  # one of an earlier build does not belong to this _C.so
            (package / "_C_cuda.so").unlink(missing_ok=True)
        for extension in self.extensions:
            name = Path(self.get_ext_filename(extension.name)).name
            install_file(build / name, package / name)


class Wheel(bdist_wheel):
    """Tag the wheel for every Python when nothing inside is bound to one."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if wants_host() else ("py3", "none", platform)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"gemma_ext.{name}", sources=[]) for name in library_names()],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    )
