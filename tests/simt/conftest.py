"""The checker's tests, the ops and the device code are compiled once per session."""

import shutil

import pytest
from toolchain import build_checker, build_cuda_guard, build_op_library, nvcc


@pytest.fixture(scope="session")
def checker(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build_checker(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="session")
def op_library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build_op_library(tmp_path_factory.mktemp("ops_on_host"))


@pytest.fixture(scope="session")
def cuda_guard(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build_cuda_guard(tmp_path_factory.mktemp("cuda_guard"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    out, done = tmp_path_factory.mktemp("nvcc"), {}

    def compile_once(kernels: str, arch: str):
        if kernels not in done:
            done[kernels] = nvcc(kernels, arch, out)
        return done[kernels]

    return compile_once
