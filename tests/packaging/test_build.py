"""The build itself: what one edit recompiles, what a wheel holds, what a missing torch says."""

import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import importlib.util, runpy, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


def planned_steps(build_dir: Path) -> set[str]:
    """Outputs that ninja would make now."""
    command = [sys.executable, "-m", "ninja", "-C", str(build_dir), "-n", "-v", "_C"]
    text = subprocess.check_output(command, text=True)
    return {
        line.split(" -o ")[1].split()[0]
        for line in text.splitlines()
        if line.startswith("[") and " -o " in line
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [("csrc/common/torch/library.cpp", "bindings"), ("csrc/cce/ops.cpp", "bindings")],
)
def test_touching_one_source_recompiles_it_alone(root, build_dir, source, target):
    before = planned_steps(build_dir)
    path = root / source
    times = path.stat()
    os.utime(path)
    try:
        after = planned_steps(build_dir)
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert after - before == {f"CMakeFiles/{target}.dir/{source}.o", "_C.so"} - before


def run_setup(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1100,
    )


def test_missing_torch_is_one_sentence_with_the_remedy(root):
    done = run_setup(root, "-c", WITHOUT_TORCH)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "found none: install torch and run" in last
    assert "--no-build-isolation" in last
    assert "Traceback" not in done.stderr


def test_wrong_torch_folder_is_named(root, tmp_path):
    done = run_setup(root, "setup.py", "-q", "build_ext", GEMMA_EXT_TORCH_DIR=str(tmp_path))
    assert done.returncode == 1
    assert f"expected torch >= 2.10 with its headers in {tmp_path}" in done.stderr


@pytest.mark.timeout(1200)  # compiles all
def test_wheel_holds_the_package_and_nothing_else(root, tmp_path):
    done = run_setup(
        root, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build",
        "--build-base", str(tmp_path / "build"), "bdist_wheel", "--dist-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(n).decode() for n in names if n.endswith("/METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gemma_ext"}
    sources = {
        str(path.relative_to(root))
        for path in (root / "gemma_ext").rglob("*.py")
        if (path.parent / "__init__.py").is_file()
    }
    assert sources <= names
    assert {"gemma_ext/_C.so", "gemma_ext/build_info.json", "gemma_ext/py.typed"} <= names
    assert ("gemma_ext/_C_cuda.so" in names) == (root / "gemma_ext" / "_C_cuda.so").is_file()
    assert any(name.startswith("gemma_ext/_host.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    required = [
        r for r in metadata.splitlines() if r.startswith("Requires-Dist") and "extra" not in r
    ]
    assert required == ["Requires-Dist: torch>=2.10", "Requires-Dist: numpy"]


def test_build_without_cuda_removes_the_library_of_an_earlier_one(root, tmp_path):
    stale = tmp_path / "gemma_ext" / "_C_cuda.so"
    stale.parent.mkdir()
    stale.touch()
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = run_setup(root, *command, GEMMA_EXT_CUDA="OFF")
    assert done.returncode == 0, done.stderr
    assert stale.with_name("_C.so").is_file()
    assert not stale.exists()


def test_source_archive_can_be_built_from(root, tmp_path):
    done = run_setup(
        root, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--formats=zip",
        "--dist-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.namelist()}
    sources = {str(path.relative_to(root)) for path in (root / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names


@pytest.fixture
def setup_script(root) -> dict:
    return runpy.run_path(str(root / "setup.py"), run_name="setup")


def program(folder: Path, name: str, says: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)


def test_a_tool_without_its_package_is_taken_from_path(setup_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmake", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program(tmp_path, "cmake", "cmake version 3.31.2-rc1")
    found = setup_script["find_tool"]("cmake", "CMAKE_BIN_DIR", (3, 28))
    assert found == str(tmp_path / "cmake")
    program(tmp_path, "cmake", "cmake version 3.25.1")
    with pytest.raises(SystemExit, match=r"cmake >= 3\.28, but .*cmake is 3\.25\.1"):
        setup_script["find_tool"]("cmake", "CMAKE_BIN_DIR", (3, 28))


def test_a_tool_that_is_nowhere_is_named(setup_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"ninja >= 1\.10, but there is none: pip install ninja"):
        setup_script["find_tool"]("ninja", "BIN_DIR", (1, 10))
