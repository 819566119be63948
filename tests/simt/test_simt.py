"""Device code on the host, under the commit's schedule or all kinds, and through nvcc."""

import os
import re
import subprocess

import pytest
from toolchain import CSRC, HERE, find_cuobjdump

pytestmark = pytest.mark.timeout(1500)  # the first test to come compiles for all
SEED = int(os.environ["GEMMA_EXT_SCHEDULE_SEED"])
# each way to choose the next thread (seed modulo 3) with each time for asynchronous operations
KINDS = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(9) if seed != SEED]
CASES = [
    name
    for source in sorted(HERE.glob("*.cpp"))
    for name in re.findall(r"^CASE\((\w+)\)", source.read_text(), re.MULTILINE)
]
# kernel file: architecture, what its PTX names, what its SASS holds
DEVICE_CODE = {
    "execution": ("80", ["shfl.sync.bfly", "bar.arrive", "redux.sync"], ["SHFL.BFLY", "REDUX"]),
    "mma": (
        "80",
        ["mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared"],
        ["HMMA.16816", "LDSM", "LDGSTS"],
    ),
    "tile": (
        "80",
        ["mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4.trans", "cp.async.cg.shared"],
        ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "LDSM.16.MT88.4", "LDGSTS"],
    ),
    "async": (
        "90a",
        [
            "cp.async.bulk.tensor.2d.shared::cluster.global",
            "cp.async.bulk.tensor.3d.shared::cluster.global",
            "multicast::cluster",
            "cp.reduce.async.bulk.tensor.2d",
            "mbarrier.try_wait.parity",
            "mapa.u64",
        ],
        ["UTMALDG.2D.MULTICAST", "UTMALDG.3D", "UTMASTG", "UTMAREDG", "SYNCS"],
    ),
    "launch": ("90a", ["multicast::cluster"], ["UTMALDG"]),
    "wgmma": (
        "90a",
        ["wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "setmaxnreg.inc", "stmatrix"],
        ["HGMMA.64x64x16.F32.BF16", "HGMMA.64x256x16.F32.BF16", "UTMALDG", "USETMAXREG", "STSM"],
    ),
}


@pytest.mark.parametrize("seed", [SEED, *KINDS])
@pytest.mark.parametrize("case", CASES)
def test_case(checker, case, seed):
    command = [checker, "--case", case, "--seed", str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if case.startswith("asan_"):
        assert ran.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
    else:
        assert ran.returncode == 0, ran.stderr


def test_every_case_is_run(checker):
    listed = subprocess.run([checker, "--list"], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(CASES)


def test_torch_is_not_included():
    for path in (CSRC / "common" / "simt").glob("*.h"):
        assert not re.search(r"#include.*torch", path.read_text()), path


@pytest.mark.parametrize("kernels", DEVICE_CODE)
def test_nvcc_compiles_the_same_kernels(compiled, kernels):
    arch, instructions, _ = DEVICE_CODE[kernels]
    _, ptx = compiled(kernels, arch)
    assert [name for name in instructions if name not in ptx] == []


@pytest.mark.parametrize("kernels", DEVICE_CODE)
def test_sass_holds_the_instructions(compiled, kernels):
    arch, _, opcodes = DEVICE_CODE[kernels]
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path, _ = compiled(kernels, arch)
    sass = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=True)
    assert [name for name in opcodes if name not in sass.stdout] == []
