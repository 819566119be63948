"""Where _C_cuda.so is built: every op has its CUDA kernel, and no CUDA tensor is refused."""

import pytest
import torch

from gemma_ext import _loader
from gemma_ext.ops.cce import inputs

pytestmark = pytest.mark.skipif(
    _loader.load().cuda_path is None, reason="needs _C_cuda.so: build with GEMMA_EXT_CUDA=ON"
)


@pytest.mark.parametrize("name", ["cce_forward", "cce_backward", "cce_fused"])
def test_op_has_a_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gemma_ext::{name}", "CUDA")
    assert _loader.cuda_refusal(name) is None


def test_cuda_tensors_are_taken():
    assert inputs._CUDA_REFUSAL is None
