"""How the kernels of this folder are compiled: by g++ for the checker, by nvcc for the device."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
INCLUDES = [f"-I{CSRC}", f"-I{HERE}"]
# -ftrivial-auto-var-init: registers start as 0xfefefefe, -1.7e38 in fp32 and in bf16
HOST_FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def made_once(build: Callable[[Path], Path]) -> Path:
    """What `build` makes in build/tests, by one of all processes, until something changes.

    What counts: every source, this file, the compiler and torch.
    """
    kept = ROOT / "build" / "tests"
    kept.mkdir(parents=True, exist_ok=True)
    with open(kept / f"{build.__name__}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = kept / f"{build.__name__}-{_inputs()}"
        result = folder / "result"
        if not result.is_file():
            for older in kept.glob(f"{build.__name__}-*"):
                shutil.rmtree(older)
            with tempfile.TemporaryDirectory(dir=kept) as partial:
                built = build(Path(partial))
                folder.mkdir()
                os.replace(built, result)
        return result


@cache
def _inputs() -> str:
    import torch

    version = subprocess.run(["g++", "-v"], capture_output=True, check=True).stderr
    found = hashlib.sha256(version + torch.__version__.encode())
    for path in sorted([*CSRC.rglob("*.*"), *HERE.rglob("*.h"), *HERE.glob("*.cpp")]):
        found.update(f"{path}\n".encode() + path.read_bytes())
    found.update(Path(__file__).read_bytes())
    return found.hexdigest()[:16]


def build_checker(out: Path) -> Path:
    """One translation unit: the backend, most of the work under sanitizers, is compiled once."""
    whole, binary = out / "simt_tests.cpp", out / "simt_tests"
    sources = sorted(path.name for path in HERE.glob("*.cpp"))
    whole.write_text("".join(f'#include "{name}"\n' for name in sources))
    subprocess.run(["g++", *HOST_FLAGS, *INCLUDES, whole, "-o", binary], check=True)
    return binary


# How the fibers of the op library are scheduled, and whether they say to be on Hopper.
SCHEDULE = """
extern "C" void schedule(uint64_t seed, bool hopper) {
  gemma_ext::simt::host::options.seed = seed;
  gemma_ext::simt::host::options.hopper = hopper;
}
"""


def build_op_library(out: Path) -> Path:
    """The CUDA bindings of the ops and their kernels, for CPU tensors (common/torch/cuda.h)."""
    torch, library = _torch_folder(), out / "ops.so"
    compile_host = ["g++", "-std=c++20", "-g1", "-fPIC", f"-I{CSRC}", "-c"]
    device = ["-O2", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern"]
    host_binding = [
        *("-O1", "-DGEMMA_EXT_ON_HOST", "-DTORCH_STABLE_ONLY"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", torch / "include"),
    ]

    def compiled(source: Path, name: str, flags: list[object]) -> Path:
        made = out / f"{name}.o"
        subprocess.run([*compile_host, *flags, source, "-o", made], check=True)
        return made

    jobs = []
    for binding in sorted(CSRC.glob("*/cuda_ops.cpp")):
        family = binding.parent.name
        kernels = out / f"{family}.cpp"
        sources = sorted(path.name for path in (binding.parent / "cuda").glob("*.cu"))
        kernels.write_text("".join(f'#include "{family}/cuda/{name}"\n' for name in sources))
        jobs += [(kernels, family, device), (binding, f"{family}_binding", host_binding)]
    schedule = out / "schedule.cpp"
    schedule.write_text('#include "common/simt/simt.h"\n' + SCHEDULE)
    jobs.append((schedule, "schedule", device))
    with ThreadPoolExecutor(2) as side_by_side:
        objects = list(side_by_side.map(compiled, *zip(*jobs, strict=True)))
    link = ["g++", "-shared", *objects, "-o", library]
    subprocess.run([*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"], check=True)
    return library


def build_cuda_guard(out: Path) -> Path:
    """What a torch without CUDA lacks to slice fake CUDA tensors."""
    torch = _torch_folder()
    source, library = out / "guard.cpp", out / "guard.so"
    source.write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "namespace c10::impl {\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)\n"
        "}\n"
    )
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-isystem", torch / "include", source]
    subprocess.run([*command, "-o", library, f"-L{torch / 'lib'}", "-lc10"], check=True)
    return library


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def nvcc(kernels: str, arch: str, out: Path) -> tuple[Path, str]:
    """The object file and the PTX of kernels/<kernels>.h."""
    source, compiled = out / f"{kernels}.cu", out / f"{kernels}.o"
    source.write_text(f'#include "kernels/{kernels}.h"\n')
    command = ["nvcc", "-std=c++20", "-Werror=all-warnings", "--keep", f"--keep-dir={out}"]
    command += [*INCLUDES, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    made = subprocess.run([*command, "-c", source, "-o", compiled], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return compiled, (out / f"{kernels}.ptx").read_text()


def find_cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("nvidia")  # where the package nvidia-cuda-cuobjdump puts it
    for folder in spec.submodule_search_locations if spec and not found else []:
        found = next((str(p) for p in Path(folder).glob("*/bin/cuobjdump")), None)
    return found
