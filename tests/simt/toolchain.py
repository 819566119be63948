"""How the kernels of this folder are compiled: by g++ for the checker, by nvcc for the device."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
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
    """The CUDA binding of the cce ops and its kernels, for CPU tensors (common/torch/cuda.h)."""
    torch = _torch_folder()
    kernels, binding, library = out / "kernels.cpp", CSRC / "cce" / "cuda_ops.cpp", out / "ops.so"
    sources = sorted(path.name for path in (CSRC / "cce" / "cuda").glob("*.cu"))
    includes = "".join(f'#include "cce/cuda/{name}"\n' for name in sources)
    kernels.write_text(includes + SCHEDULE)
    compile_host = ["g++", "-std=c++20", "-g1", "-fPIC", f"-I{CSRC}", "-c"]
    host_binding = [
        *("-O1", "-DGEMMA_EXT_ON_HOST", "-DTORCH_STABLE_ONLY"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", torch / "include"),
    ]
    objects = []
    for source, flags in (
        (kernels, ["-O2", "-ftrivial-auto-var-init=pattern"]),
        (binding, host_binding),
    ):
        objects.append(out / f"{source.stem}.o")
        subprocess.run([*compile_host, *flags, source, "-o", objects[-1]], check=True)
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
