"""The CUDA binding and its kernels through Python: the op tests on device code, in a process of its
own because its library replaces the CPU kernels."""

import os
import subprocess
import sys

import pytest
from toolchain import HERE

OPS = HERE.parent / "ops"
# files: which of their tests
PARTS = {
    "device": ("checks_device.py", ""),
    "options": (
        "test_cce_options.py test_cce_outputs.py",
        "not (test_option and not mean) and not (test_shift and not mean) and not agree",
    ),
    "gradients": (
        "test_cce_gradients.py test_cce_state.py test_cce_nonfinite.py",
        "not learned and not masked_words and not (subset and none) and not scalar",
    ),
    "inputs": (
        "test_cce_labels.py test_cce_layouts.py test_cce_opcheck.py",
        "not (anything and inf) and not (test_layout and not both) and not (opcheck and fp32)",
    ),
}


def run_on_device_code(library, files: str, chosen: str, *more: str) -> None:
    environment = os.environ | {
        "GEMMA_EXT_TEST_OPS": str(library),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "device_code", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-k", chosen, *more]
    ran = subprocess.run(
        [*command, *(str(OPS / name) for name in files.split())],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


@pytest.mark.parametrize("part", PARTS)
def test_ops(op_library, part):
    run_on_device_code(op_library, *PARTS[part], "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_all_ops(op_library):
    names = "options outputs gradients state nonfinite labels layouts opcheck compile filter fuzz"
    files = " ".join(f"test_cce_{name}.py" for name in names.split())
    run_on_device_code(op_library, files, "", "-m", "not slow")
