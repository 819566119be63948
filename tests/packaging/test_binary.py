"""What the compiled files contain: the stable interface only, and no code above its guard."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_ext

LIBRARIES = ["_C.so"]
if (Path(gemma_ext.__file__).parent / "_C_cuda.so").is_file():
    LIBRARIES.append("_C_cuda.so")
X86_ISAS = ["baseline", "avx2", "avx512", "avx512bf16", "amxbf16"]


def nm(*arguments: str) -> list[list[str]]:
    """Fields of each line that `nm` prints."""
    text = subprocess.check_output(["nm", *arguments], text=True)
    return [line.split() for line in text.splitlines() if line.strip()]


@pytest.fixture(params=LIBRARIES)
def library(root, request) -> Path:
    return root / "gemma_ext" / request.param


def test_op_library_uses_only_the_stable_torch_abi_of_2_10(library):
    tool = Path(sys.executable).with_name("torch-abi-audit")
    audit = json.loads(subprocess.check_output([tool, "--json", library], text=True))
    torch_use = audit["bundled_libs"][0]["torch"]
    assert torch_use["stable"]
    assert torch_use["unstable_symbols"] == torch_use["unknown_shim_symbols"] == []
    assert torch_use["min_torch_version"] == "2.10.0"


def test_op_library_needs_no_python_and_no_torch_internals(library):
    symbols = {line[-1].split("@")[0] for line in nm("-D", str(library))}
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert not [s for s in symbols if s.startswith(("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at"))]
    assert not [s for s in symbols if s.startswith(("GOMP_", "__kmpc_", "omp_"))]


def test_op_library_reaches_libtorch_and_links_nothing_else_of_it(library):
    text = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "NEEDED" in line]
    assert {n for n in needed if "torch" in n} == {"libtorch.so", "libtorch_cpu.so"}
    assert not [n for n in needed if n.startswith(("libc10", "libgomp", "libpython", "libcuda"))]
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def compile_commands(build_dir: Path) -> list[dict]:
    return json.loads((build_dir / "compile_commands.json").read_text())


def test_no_flag_depends_on_the_build_machine(build_dir):
    for entry in compile_commands(build_dir):
        assert "-march=" not in entry["command"]
        assert "-mtune=" not in entry["command"]
        assert "-ffast-math" not in entry["command"]
        assert "use_fast_math" not in entry["command"]


def test_kernels_are_compiled_without_torch_headers(root, build_dir):
    kernels = [
        e
        for e in compile_commands(build_dir)
        if "/cpu/" in e["file"].removeprefix(str(root)) or e["file"].endswith(".cu")
    ]
    assert kernels
    for entry in kernels:
        assert "torch/include" not in entry["command"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one kernel build")
def test_kernel_source_is_built_for_every_instruction_set(build_dir):
    commands = [e["command"] for e in compile_commands(build_dir)]
    built = [c for c in commands if c.endswith("csrc/cce/cpu/kernels.cpp")]
    assert sorted(isa for isa in X86_ISAS for c in built if f"GEMMA_EXT_ISA={isa} " in c) == sorted(
        X86_ISAS
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one kernel build")
@pytest.mark.parametrize("isa", X86_ISAS[1:])
def test_wide_objects_share_no_function_with_the_rest(build_dir, isa):
    """Of equal inline functions the linker keeps one, and the AVX-512 one stops an older CPU."""
    objects = list(build_dir.glob(f"CMakeFiles/*_{isa}.dir/**/*.o"))
    assert objects
    own_namespace = re.compile(rf"9gemma_ext\d+[a-z]+{len(isa)}{isa}")
    for path in objects:
        weak = [line[-1] for line in nm(str(path)) if len(line) == 3 and line[1] in "WV"]
        assert [name for name in weak if not own_namespace.search(name)] == []
