"""The checker's tests and the ops are compiled when a source has changed, the device code once."""

import shutil

import pytest
from toolchain import build_checker, build_cuda_guard, build_op_library, made_once, nvcc


@pytest.fixture(scope="session")
def checker():
    return _made_by_gcc(build_checker)


@pytest.fixture(scope="session")
def op_library():
    return _made_by_gcc(build_op_library)


@pytest.fixture(scope="session")
def cuda_guard():
    return _made_by_gcc(build_cuda_guard)


def _made_by_gcc(build):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return made_once(build)


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
