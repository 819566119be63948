"""`.ci/cuda_checks.py` on reports with and without the fault it looks for."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

KERNEL = "_ZN9gemma_ext3cce18cce_forward_kernelILi64EEEvNS0_6ParamsE"
LOG = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_80'
ptxas info    : Function properties for {KERNEL}
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90a'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 368 bytes cmem[0]
"""
ELF = (
    "ELF file    1: a.sm_90a.cubin\nELF file    2: a.sm_100.cubin\nELF file    3: b.sm_90a.cubin\n"
)
PTX = "PTX file    1: a.sm_90.ptx\nPTX file    2: b.sm_90.ptx\n"


@pytest.fixture(scope="module")
def checks() -> SimpleNamespace:
    script = Path(__file__).resolve().parents[2] / ".ci" / "cuda_checks.py"
    return SimpleNamespace(**runpy.run_path(str(script)))


def test_report_of_ptxas_is_read(checks):
    registers, spills = checks.read_kernels(LOG)
    assert registers == {KERNEL: {"80": 255, "90a": 168}}
    assert spills == {KERNEL: {"80": 20, "90a": 0}}


@pytest.mark.parametrize(
    ("listed", "problems"),
    [
        ("# a comment\n\n", []),
        ("cce_forward_kernel", [f"{KERNEL} spills 20 bytes on 80"]),
        ("cce_forward_kernel 90a  # the Hopper body", []),
        ("forward_kernel", ["no_spill.txt names forward_kernel, which no source has"]),
    ],
)
def test_listed_kernels_may_not_spill(checks, listed, problems):
    assert list(checks.check_spills(checks.read_kernels(LOG)[1], listed)) == problems


def test_committed_list_can_be_read(checks):
    assert all("no_spill.txt" in p for p in checks.check_spills({}, checks.NO_SPILL.read_text()))


def test_hopper_kernels_use_its_instructions(checks):
    sass = "Function : a_wgmma_kernel\n HGMMA.64x256 UTMALDG.2D\nFunction : b_kernel\n HMMA.16816\n"
    assert list(checks.check_hopper(sass)) == []
    missing = sass.replace("HGMMA.64x256", "HMMA")
    assert list(checks.check_hopper(missing)) == ["a_wgmma_kernel has no HGMMA for 90a"]
    fenced = sass.replace("HGMMA", "MEMBAR.ALL.GPU " * 3 + "HGMMA")
    assert list(checks.check_hopper(fenced)) == [
        "a_wgmma_kernel has 3 fences of the device for 90a"
    ]


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7511", "C7519"])
def test_remarks_on_serialised_instructions_are_found(checks, code):
    line = f"ptxas info    : ({code}) Potential Performance Loss"
    assert list(checks.check_remarks(Path("a.cu"), LOG + line)) == [f"a.cu: {line}"]
    assert list(checks.check_remarks(Path("a.cu"), LOG)) == []


def test_every_source_has_every_image(checks):
    assert list(checks.check_images(ELF, PTX, ["90a", "90-virtual"], 2)) == []
    assert list(checks.check_images(ELF, PTX, ["100f", "120f", "80-virtual"], 2)) == [
        "1 of 2 sources have an image for 100f",
        "0 of 2 sources have an image for 120f",
        "0 of 2 sources have an image for 80-virtual",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("U malloc@GLIBC_2.2.5", None),
        ("U _ZSt4cout@GLIBCXX_3.4", None),
        ("w __gmon_start__", None),
        ("U aoti_torch_device_type_cuda", None),
        ("w aoti_torch_get_current_cuda_stream", None),
        ("U aoti_torch_get_current_cuda_stream", "is not weak"),
        ("U torch_c10_cuda_check_msg", "is not weak"),
        ("U cuLaunchKernel", "neither torch's stable interface"),
        ("U _ZN3c105ErrorC1Ev", "neither torch's stable interface"),
    ],
)
def test_symbols_that_are_not_everywhere_are_named(checks, line, problem):
    found = list(checks.check_symbols(f"                 {line}\n"))
    assert len(found) == (problem is not None)
    assert problem is None or (problem in found[0] and line.split()[1] in found[0])


def test_needed_libraries_are_those_of_torch_and_the_system(checks):
    row = " 0x0000000000000001 (NEEDED)             Shared library: [{}]\n".format
    usual = "".join(
        map(row, ["libtorch.so", "libtorch_cpu.so", "libc.so.6", "ld-linux-x86-64.so.2"])
    )
    assert list(checks.check_needed(usual)) == []
    wrong = ["libcuda.so.1", "libtorch_cuda.so", "libcudart.so.13", "libc10.so"]
    assert list(checks.check_needed("".join(map(row, wrong)))) == [
        f"the library needs {name}" for name in wrong
    ]


def test_bound_ops_are_there_after_loading(checks):
    bindings = 'm.impl("cce_forward", TORCH_BOX(&f));\nm.impl(\n    "cce_backward", TORCH_BOX(&g));'
    assert list(checks.check_dispatch("cce_backward cce_forward\n", bindings)) == []
    assert list(checks.check_dispatch("cce_forward\n", bindings)) == [
        "cce_backward is bound and has no CUDA kernel after loading"
    ]
    assert list(checks.check_dispatch("", "")) == ["no op is bound in a binding.h"]
