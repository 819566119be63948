# Everything from a fresh clone: each target makes .venv and installs what it needs, and does
# nothing twice. On a machine without a GPU,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# saves the download of torch's CUDA libraries.
TORCH ?= torch==2.13.0
PYTHON ?= $(firstword $(shell command -v python3.11 python3))
VENV ?= .venv
OUT ?= out
PYTEST_ARGS ?=
JOBS ?= $(shell nproc)
BENCH_ARGS ?=
# ON or AUTO adds the CUDA kernels; `pip install .` alone builds them where it finds nvcc.
GEMMA_EXT_CUDA ?= OFF
export GEMMA_EXT_CUDA

bin := $(VENV)/bin
torch_stamp := $(VENV)/.installed-$(subst =,-,$(TORCH))
cpp_files := '*.cpp' '*.h' '*.cu' '*.cuh'
dev_stamp := $(VENV)/.installed-dev
# the machine's own python3 unless PYTHON is given: the targets below make no .venv
gpu_python = $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))

.PHONY: demo test test-all bench lint format wheel build install abi-audit abi-matrix clean
.PHONY: gpu gpu-build gpu-tests gpu-sanitizer gpu-souping gpu-sae gpu-depth gpu-heads gpu-step gpu-sweep gpu-profile gpu-bench gpu-peers

demo: build
	$(bin)/gemma-ext demo --out $(OUT)/demo

test: build
	$(bin)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

test-all: build
	$(bin)/python -m pytest -n $(JOBS) --dist loadgroup --all $(PYTEST_ARGS)

bench: build
	$(bin)/python benchmarks/bench_cce.py $(BENCH_ARGS)

lint: install
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	git ls-files $(cpp_files) | xargs -r $(bin)/clang-format --dry-run -Werror

format: install
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	git ls-files $(cpp_files) | xargs -r $(bin)/clang-format -i

wheel: install
	rm -rf dist build/lib.* build/bdist.*
	$(bin)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

# Compiles what changed and puts the libraries into gemma_ext/; half a second when nothing did.
build: install
	@$(bin)/python setup.py -q build_ext --inplace

install: $(dev_stamp)

abi-audit: build
	$(bin)/torch-abi-audit --check torch gemma_ext/_C*.so

abi-matrix: wheel
	.ci/abi-matrix

# On a machine with an NVIDIA card: everything, or one stage alone. See docs/gpu.md.
gpu:
	@OUT=$(OUT) $(gpu_python) .ci/gpu.py

gpu-build gpu-tests gpu-sanitizer gpu-souping gpu-sae gpu-depth gpu-heads gpu-step gpu-sweep gpu-profile gpu-bench:
	@OUT=$(OUT) $(gpu_python) .ci/gpu.py $(@:gpu-%=%)

# Where there is a network: other people's losses for gpu-bench, unpacked into .peers/.
gpu-peers:
	@$(gpu_python) benchmarks/fetch_peers.py

$(bin)/python:
	$(PYTHON) -m venv $(VENV)

$(torch_stamp): | $(bin)/python
	$(bin)/pip install --quiet $(TORCH) numpy
	@touch $@

$(dev_stamp): pyproject.toml $(torch_stamp)
	$(bin)/pip install --quiet $(TORCH) 'setuptools>=77' wheel 'cmake>=3.28' ninja 'pybind11>=2.13'
	$(bin)/pip install --quiet --no-build-isolation -e '.[dev]' $(TORCH)
	@touch $@

clean:
	rm -rf build dist gemma_ext/*.so gemma_ext/build_info.json
