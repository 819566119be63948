"""The CUDA side of the ops without a GPU, in processes of their own.

The op tests on the binding and its kernels as fibers, which replace the CPU kernels there, and CUDA
tensors without values.
"""

import os
import subprocess
import sys

import pytest
from toolchain import HERE, ROOT

pytestmark = pytest.mark.timeout(1500)  # the first test to come compiles for all
OPS = HERE.parent / "ops"
# files: which of their tests, some of each kind; test_all_ops runs the rest
PARTS = {
    "device": ("checks_device.py", ""),
    "options": (
        "test_cce_options.py test_cce_outputs.py",
        "test_cce_outputs or everything or mean and (capped or both or num or scale_cap or True)",
    ),
    "gradients": (
        "test_cce_gradients.py test_cce_nonfinite.py",
        "not (subset and none) and not scalar and not masked_words",
    ),
    "inputs": (
        "test_cce_labels.py test_cce_layouts.py test_cce_opcheck.py",
        "not (anything and inf) and not (no_valid_row and (sum or none))"
        " and not (test_layout and not both) and not (opcheck and (fp32 or bare))",
    ),
    "divergence": (
        "test_divergence.py test_divergence_filter.py",
        "not seeds and not thread and not (float32 and 300)"
        " and not (reported and not (jsd and 1.0))",
    ),
    "logprobs": ("test_head_logprobs.py test_logprobs_rows.py", "not held and not compiler"),
    "soup": ("test_soup_values.py test_soup_merge.py test_soup_population.py", "not large_results"),
    "soup_selection": (
        "test_soup_select.py test_soup_sums.py test_soup_rows.py",
        "not survivors_keep_their_mean",
    ),
    "sae_products": (
        "test_sae_decode.py test_sae_products.py test_sae_steer.py",
        "not fp16 and not 33 and not more_tokens",
    ),
    "sae_encoders": (
        "test_sae_encode.py test_sae_encode_gradients.py test_sae_encode_layouts.py",
        # products of float32 are split: 2^-16
        "not fp16 and not 130 and not 257 and not 517 and not group_max"
        " and not margin and not (normal and fp32)",
    ),
    "depth_pages": (
        "test_depth_attention.py test_depth_compact.py test_depth_kv.py",
        "not fp16 and not (formula and fp32) and not (compact and (64 or 7 or 1000))",
    ),
    "depth_linear": (
        "test_depth_linear.py test_depth_norm.py test_depth_gate.py",
        "not fp16 and not (bits_alone and not bf16) and not real_models and not (130 or 2050)",
    ),
    "depth_head": (
        "test_depth_head.py test_depth_linear_opcheck.py",
        "not fp16 and not samples_follow and not bits_alone and not compiled"
        " and not (softmax and 130 and bf16)",
    ),
    "depth_shortlist": (
        "test_depth_shortlist.py test_depth_propagate.py",
        "not fp16 and not (large_logits or close_as) and not (head_s and not margin)"
        " and not more_layers",
    ),
    "soup_cuts": ("test_soup_bits.py", "cutting or permuted"),
}


def run_pytest(files: str, *arguments: str, **environment: object) -> None:
    """Run files of tests/ops in a new process with the plugins of this folder in reach."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
        + [OPS / name for name in files.split()],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def run_on_device_code(library: object, files: str, *arguments: str, **environment: str) -> None:
    plugin = ("-p", "device_code", "-m", "not slow")
    run_pytest(files, *plugin, *arguments, GEMMA_EXT_TEST_OPS=library, **environment)


@pytest.mark.parametrize("part", PARTS)
def test_ops(op_library, part):
    files, chosen = PARTS[part]
    run_on_device_code(op_library, files, "-k", chosen)


@pytest.mark.exhaustive
def test_all_ops(op_library):
    # without filter and fuzz, whose bounds in fp32 are below what split products keep (2^-16)
    names = "options outputs gradients nonfinite labels layouts opcheck compile"
    run_on_device_code(op_library, " ".join(f"test_cce_{name}.py" for name in names.split()))


def test_before_hopper(op_library):
    chosen = "shapes and not fp32 or bit_for_bit and bf16 or any_call"
    run_on_device_code(op_library, "checks_device.py", "-k", chosen, GEMMA_EXT_TEST_HOPPER="0")


def test_souping_has_the_bits_of_the_cpu(op_library):
    def lines(*words: object) -> list[str]:
        command = [sys.executable, HERE / "soup_cases.py", *words]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path}
        ran = subprocess.run(command, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout.splitlines()

    cpu, device = lines(), lines(op_library)
    assert len(cpu) == len(device) > 0
    assert [pair for pair in zip(cpu, device, strict=True) if pair[0] != pair[1]] == []


def test_fake_cuda(cuda_guard):
    run_pytest("checks_fake_cuda.py", GEMMA_EXT_TEST_GUARD=cuda_guard)
