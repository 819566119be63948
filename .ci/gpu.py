"""What a machine with an NVIDIA card runs: `gpu.py [STAGE...]`.

Uses the python it is started with and the tools on PATH; installs nothing and needs no network. A
stage that fails or outlasts its limit does not stop the next one. Logs and results are left in
$OUT/gpu (out/gpu by default), and the last lines printed say how each stage went.

Stages, all by default: build, tests, sanitizer, souping, sae, depth, heads, step, sweep, profile,
bench (docs/gpu.md).
GEMMA_EXT_GPU_TESTS_ON=cpu tries them without a card: no CUDA kernels, small shapes, nothing saved.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT") or "out").resolve() / "gpu"
TOTAL = 525.0  # seconds for all stages; the bench takes what the others leave
LIMITS = {
    "build": 150.0,
    "tests": 170.0,
    "sanitizer": 110.0,
    "souping": 60.0,
    "sae": 60.0,
    "depth": 60.0,
    "heads": 60.0,
    "step": 110.0,
    "sweep": 45.0,
    "profile": 30.0,
    "bench": 240.0,
}
PIECE = 75.0  # for one file of tests, one tool of the sanitizer: what hangs costs no more
TESTS = ("edges", "sync", "graphs", "streams", "determinism")
OP_TESTS = ("values", "gradients", "filter", "options", "outputs")
DIVERGENCE_TESTS = ("divergence", "divergence_filter")
SOUPING = "test_gpu_soup.py"
SOUP_TESTS = ("merge", "select", "rows", "sums", "population", "values")
SAE = "test_gpu_sae.py"
SAE_TESTS = ("decode", "products", "steer", "encode", "encode_gradients")
# products of float32 are split on a card: 2^-16, and NaN for infinities
SAE_CHOSEN = "cuda and not margin and not infinities and not (normal and fp32)"
DEPTH = "test_gpu_depth_kv.py"
DEPTH_TESTS = ("compact", "kv", "attention", "models", "propagate")
HEADS = "test_gpu_depth_linear.py"
HEADS_TESTS = ("linear", "norm", "head", "gate", "shortlist")
SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
ENDS_EARLY = 25.0  # before the limit of a stage with a budget: room for the case that is at work
DEVICE = os.environ.get("GEMMA_EXT_GPU_TESTS_ON", "cuda")
TRIAL_SHAPE = "64,96,1024"
OPTIONAL = {"sanitizer"}  # not every toolkit has it
CARD = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"


class NotRun(Exception):
    """A stage cannot run on this machine; says why."""


@dataclass
class Stage:
    """Where a stage logs and when it has to end."""

    name: str
    end: float  # on the clock of time.monotonic

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, *command: object, limit: float = math.inf, **environment: str) -> int:
        """Exit status of a command whose output goes to the terminal and to the log; 124 if it
        runs past the end of the stage or ``limit`` seconds.

        Everything the command started is ended with it.
        """
        words = [str(word) for word in command]
        with (OUT / f"{self.name}.log").open("a") as log:
            print("$", *words, file=log, flush=True)
            print("$", *words, flush=True)
            worker = subprocess.Popen(
                words,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            tee = subprocess.Popen(["tee", "-a", log.name], stdin=worker.stdout)
            try:
                return worker.wait(timeout=max(min(self.left, limit), 1.0))
            except subprocess.TimeoutExpired:
                print(f"{self.name}: stopped at its limit", flush=True)
                return 124
            finally:
                end_group(worker)
                worker.stdout.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tee.wait(timeout=5)  # what left the group may hold the pipe open
                tee.kill()


def end_group(worker: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def card_arch() -> str:
    """The target that fits the card: what GEMMA_EXT_CUDA_ARCHS says, or else its own."""
    chosen = os.environ.get("GEMMA_EXT_CUDA_ARCHS")
    return chosen or target_of(compute_capability())


def target_of(capability: str) -> str:
    """nvcc's most specific target for a compute capability such as "9.0"."""
    major, minor = capability.split(".")
    if major == "9":
        return "90a"
    return f"{major}0f" if major in ("10", "12") else major + minor


def compute_capability() -> str:
    queries: tuple[Sequence[str], ...] = (
        ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"),
        (sys.executable, "-c", CARD),
    )
    for query in queries:
        try:
            text = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL, timeout=60)
            return str(float(text.split()[0]))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
    raise NotRun("neither nvidia-smi nor torch names a card; set GEMMA_EXT_CUDA_ARCHS")


def build(stage: Stage) -> int:
    target = {"GEMMA_EXT_CUDA": "OFF"}
    if DEVICE == "cuda":
        target = {"GEMMA_EXT_CUDA": "ON", "GEMMA_EXT_CUDA_ARCHS": card_arch()}
    status = stage.run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", **target)
    return status or stage.run(sys.executable, "-m", "gemma_ext.info", PYTHONPATH=import_path())


def tests(stage: Stage) -> int:
    if find_spec("pytest") is None:
        raise NotRun(f"{sys.executable} has no pytest")
    runs: list[Sequence[object]] = [(path,) for path in test_files()]
    if DEVICE == "cuda":
        files = [f"tests/ops/test_cce_{name}.py" for name in OP_TESTS]
        files += [f"tests/ops/test_{name}.py" for name in DIVERGENCE_TESTS]
        chosen = ("-k", "cuda", "-m", "not slow")
        runs.insert(0, ("-c", "tests/gpu/pytest.ini", *files, *chosen))
    # a process each: a kernel that breaks the card spoils one of them
    return worst(run_tests(stage, *words) for words in runs)


def run_tests(stage: Stage, *words: object, limit: float = PIECE) -> int:
    return stage.run(
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=3", *words,
        limit=limit, PYTHONPATH=import_path(), GEMMA_EXT_NEED_CARD="1",
    )  # fmt: skip


def test_files() -> list[Path]:
    """Files of tests/gpu but those of other stages, those of TESTS first: time may run out."""
    names = [f"test_gpu_{name}.py" for name in TESTS]
    found = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    elsewhere = {family.test for family in FAMILIES.values()}
    found = [path for path in found if path.name not in elsewhere]
    return sorted(found, key=lambda p: names.index(p.name) if p.name in names else len(names))


def sanitizer(stage: Stage) -> int:
    script = (sys.executable, "tests/gpu/small_shapes.py")
    if DEVICE != "cuda":
        return stage.run(*script, PYTHONPATH=import_path())
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer",
        path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
    )
    if tool is None:
        raise NotRun("there is no compute-sanitizer on PATH or in CUDA_HOME")
    return worst(
        stage.run(
            tool, "--tool", check, "--error-exitcode", "1", "--print-limit", "20", *script,
            limit=PIECE, PYTHONPATH=import_path(), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        for check in SANITIZERS
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A stage that measures kernels, and tests them in the time that is left then.

    Attributes:
        script: the benchmark. test: of tests/gpu. ops: of tests/ops, without "test_" and ".py".
        share: of the stage's time, as the benchmark's --seconds.
        given: its further options. trial: those of a run without a card.
        chosen: of tests/ops, as pytest's -k.
    """

    script: str
    test: str
    ops: Sequence[str]
    trial: Sequence[object]
    share: float = 1 / 4
    given: Sequence[object] = ()
    chosen: str = "cuda"

    def __call__(self, stage: Stage) -> int:
        words = [*self.given, "--seconds", stage.left * self.share]
        status = measure(stage, self.script, words, self.trial)
        if find_spec("pytest") is None:
            raise NotRun(f"{sys.executable} has no pytest")
        runs: list[Sequence[object]] = [(f"tests/gpu/{self.test}",)]
        if DEVICE == "cuda":
            files = [f"tests/ops/test_{name}.py" for name in self.ops]
            runs.append(("-c", "tests/gpu/pytest.ini", *files, "-k", self.chosen, "-m", "not slow"))
        return status or worst(run_tests(stage, *words, limit=stage.left) for words in runs)


FAMILIES = {
    "souping": Family(
        "bench_souping_card.py",
        SOUPING,
        [f"soup_{name}" for name in SOUP_TESTS],
        ["--layers", 1, "--width", 64, "--seconds", 0, "--rounds", 1],
    ),
    "sae": Family(
        "bench_sae_card.py",
        SAE,
        [f"sae_{name}" for name in SAE_TESTS],
        ["--tokens", 64, "--features", 1500, "--width", 96, "--seconds", 0, "--rounds", 1],
        chosen=SAE_CHOSEN,
    ),
    "depth": Family(
        "bench_depth_kv.py",
        DEPTH,
        [f"depth_{name}" for name in DEPTH_TESTS],
        ["--rows", 2, "--context", 40, "--seconds", 0],
    ),
    "heads": Family(
        "bench_depth_linear.py",
        HEADS,
        [f"depth_{name}" for name in HEADS_TESTS],
        ["--rows", 2, "--shape", 32, 300, "--rank", 8, "--seconds", 0],
        share=1 / 15,  # its --seconds are of a number of rows
        given=["--rows", 1, 32, 128, "--dtype", "bf16"],
    ),
}


def step(stage: Stage) -> int:
    if find_spec("transformers") is None:
        raise NotRun(f"{sys.executable} has no transformers")
    words = ["--impl", "eager", "liger", "ours", "--budget", int(stage.left - ENDS_EARLY)]
    trial = ["--cases", "flat", "lora", "--batch", 1, "--tokens", 64, "--seconds", 0, "--rounds", 1]
    return measure(stage, "bench_step.py", words, trial)


def sweep(stage: Stage) -> int:
    trial = ["--shape", TRIAL_SHAPE, "--seconds", 0, "--rounds", 1]
    return measure(stage, "sweep_cce.py", [], trial)


def profile(stage: Stage) -> int:
    words = ["--device", DEVICE]
    trial = ["--shape", TRIAL_SHAPE] if DEVICE != "cuda" else []
    return stage.run(
        sys.executable, "benchmarks/profile_cce.py", *words, *trial, PYTHONPATH=import_path()
    )


def bench(stage: Stage) -> int:
    words = ["--card", "--budget", int(stage.left - ENDS_EARLY)]
    trial = ["--shape", TRIAL_SHAPE, "--seconds", 0, "--impl", "eager", "exact", "cce"]
    return measure(stage, "bench_cce.py", words, trial)


def measure(stage: Stage, script: str, words: Iterable[object], trial: Iterable[object]) -> int:
    """Run a benchmark that saves its tables, and copy them; ``trial`` is for a run without a card,
    which saves nothing."""
    start = time.time()
    status = stage.run(
        sys.executable, f"benchmarks/{script}", "--device", DEVICE, *words,
        *(["--save"] if DEVICE == "cuda" else trial), PYTHONPATH=import_path(),
    )  # fmt: skip
    for path in (ROOT / "benchmarks" / "results").glob("nvidia-*/*.*"):
        if path.stat().st_mtime >= start:
            shutil.copy2(path, OUT)
    return status


def worst(statuses: Iterable[int]) -> int:
    """The first status that is not 0, after all have been gathered."""
    return next(filter(None, list(statuses)), 0)


def import_path() -> str:
    """PYTHONPATH with this checkout before everything else."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


STAGES: dict[str, Callable[[Stage], int]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    **FAMILIES,
    "step": step,
    "sweep": sweep,
    "profile": profile,
    "bench": bench,
}


def run_stage(name: str, seconds: float) -> str:
    """How a stage went, in words: passed, not run, or failed."""
    (OUT / f"{name}.log").unlink(missing_ok=True)
    try:
        status = STAGES[name](Stage(name, time.monotonic() + seconds))
    except NotRun as reason:
        return f"not run: {reason}"
    return "passed" if status == 0 else f"FAILED with status {status}"


def main(names: Sequence[str]) -> int:
    unknown = set(names) - set(STAGES)
    if unknown:
        raise SystemExit(f"expected stages out of {', '.join(STAGES)}, got {sorted(unknown)}")
    OUT.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    lines, failed = [], False
    for name in names or STAGES:
        begin = time.monotonic()
        print(f"== {name}", flush=True)
        result = run_stage(name, min(LIMITS[name], TOTAL - (begin - start)))
        failed |= result != "passed" and not (name in OPTIONAL and result.startswith("not run"))
        lines.append(f"{name:<10}{time.monotonic() - begin:>5.0f} s  {result}")
        print(f"== {lines[-1]}", flush=True)
    lines.append(f"{'total':<10}{time.monotonic() - start:>5.0f} s")
    print("\n".join(["", "== summary", *lines]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
