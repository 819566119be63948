"""Check a CUDA build without a GPU: `python cuda_checks.py <build folder>`.

Beside the libraries in <build folder>/gemma_ext it reads what ptxas said of every source, which
the build keeps in <object>.ptxas.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NO_SPILL = ROOT / ".ci" / "no_spill.txt"
# wgmma that ptxas serialises, setmaxnreg that it ignores
REMARK = re.compile(r"\(C75(08|10|11|19)\)")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SYSTEM_SYMBOL = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
STABLE_SYMBOL = re.compile(r"(aoti_)?torch_\w+")
LOADER_SYMBOLS = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
NEEDED = re.compile(r"lib(torch|torch_cpu|stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so|ld-linux")
LIST_CUDA_OPS = """
import torch
from gemma_ext import _loader, info
assert _loader.load().cuda_error is None, _loader.load().cuda_error
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print(*[name.split("::")[1] for name in info.operators() if has_kernel(name, "CUDA")])
"""

Spills = dict[str, dict[str, int]]


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; its failure ends the checks."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def logs(build: Path) -> dict[Path, str]:
    """What ptxas said of each source."""
    found = {}
    for path in sorted(ROOT.glob("csrc/*/cuda/**/*.cu")):
        source = path.relative_to(ROOT)
        target = build / "CMakeFiles" / f"{source.parts[1]}_cuda.dir"
        found[source] = Path(f"{target / source}.o.ptxas").read_text()
    return found


def read_kernels(log: str) -> tuple[Spills, Spills]:
    """Registers and spilled bytes, by kernel and architecture."""
    registers, spills = defaultdict(dict), defaultdict(dict)
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernel, arch = match.groups()
            spills[kernel][arch] = 0
        elif match := SPILL.search(line):
            spills[kernel][arch] += int(match[1]) + int(match[2])
        elif match := REGISTERS.search(line):
            registers[kernel][arch] = int(match[1])
    return registers, spills


def check_spills(spills: Spills, listed: str) -> Iterator[str]:
    """Spills of listed kernels, and listed kernels that do not exist."""
    for line in listed.splitlines():
        name, *archs = line.split("#")[0].split() or [None]
        if name is None:
            continue
        instances = [kernel for kernel in spills if f"{len(name)}{name}" in kernel]
        if not instances:
            yield f"{NO_SPILL.name} names {name}, which no source has"
        for kernel in instances:
            for arch, size in spills[kernel].items():
                if size and (not archs or arch in archs):
                    yield f"{kernel} spills {size} bytes on {arch}"


def check_remarks(source: Path, log: str) -> Iterator[str]:
    """Remarks of ptxas that cost speed."""
    for line in log.splitlines():
        if REMARK.search(line):
            yield f"{source}: {line}"


def check_images(elf: str, ptx: str, archs: list[str], sources: int) -> Iterator[str]:
    """Architectures for which the library lacks the image of a source."""
    cubins = Counter(re.findall(r"\.sm_(\w+)\.cubin", elf))
    texts = Counter(re.findall(r"\.sm_(\w+)\.ptx", ptx))
    for arch in archs:
        number = arch.removesuffix("-virtual")
        images = cubins if number == arch else texts
        count = (
            images[number] or images[number.removesuffix("f")]
        )  # family targets lose their letter
        if count < sources:
            yield f"{count} of {sources} sources have an image for {arch}"


def check_hopper(sass: str) -> Iterator[str]:
    """Kernels named after wgmma whose sm_90a code (`cuobjdump -sass`) lacks it or TMA, or has more
    fences of the device than the two of its cluster barriers."""
    for body in sass.split("Function : ")[1:]:
        name = body.split(maxsplit=1)[0]
        if "wgmma" not in name:
            continue
        for opcode in ("HGMMA", "UTMALDG"):
            if opcode not in body:
                yield f"{name} has no {opcode} for 90a"
        if (fences := body.count("MEMBAR.ALL.GPU")) > 2:
            yield f"{name} has {fences} fences of the device for 90a"


def check_symbols(undefined: str) -> Iterator[str]:
    """Undefined symbols (`nm -D --undefined-only`) that are not everywhere."""
    for kind, name in (line.split()[-2:] for line in undefined.splitlines()):
        if SYSTEM_SYMBOL.search(name) or name in LOADER_SYMBOLS:
            continue
        if not STABLE_SYMBOL.fullmatch(name):
            yield f"symbol {name} is neither torch's stable interface nor the C and C++ libraries"
        elif "cuda_" in name and kind != "w":
            yield f"symbol {name} is not weak, so a torch without CUDA cannot load the library"


def check_needed(dynamic: str) -> Iterator[str]:
    """Libraries (`readelf -d`) that may be absent where torch is."""
    for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic):
        if not NEEDED.match(name):
            yield f"the library needs {name}"


def check_dispatch(loaded: str, bindings: str) -> Iterator[str]:
    """Ops that are bound in the source and have no CUDA kernel once loaded."""
    bound = set(re.findall(r"\.impl\(\s*\"(\w+)\"", bindings))
    if not bound:
        yield "no op is bound in a binding.h"
    for name in sorted(bound - set(loaded.split())):
        yield f"{name} is bound and has no CUDA kernel after loading"


def main() -> None:
    build = Path(sys.argv[1]).resolve()
    package = build / "gemma_ext"
    library = package / "_C_cuda.so"
    archs = json.loads((package / "build_info.json").read_text())["cuda_archs"]
    said = logs(build)
    registers, spills = read_kernels("\n".join(said.values()))
    for kernel, used in registers.items():
        shown = [
            f"{arch} {n}" + f"+{spills[kernel][arch]}B" * (spills[kernel][arch] > 0)
            for arch, n in used.items()
        ]
        print(f"{kernel}: registers {', '.join(shown)}")

    loaded = run(sys.executable, "-c", LIST_CUDA_OPS, GEMMA_EXT_LIB_DIR=str(package))
    bindings = "".join(path.read_text() for path in ROOT.glob("csrc/*/*binding.h"))
    audit = Path(sys.executable).with_name("torch-abi-audit")
    run(audit, "--check", "torch", library)
    problems = [
        *(problem for source, log in said.items() for problem in check_remarks(source, log)),
        *check_spills(spills, NO_SPILL.read_text()),
        *check_images(
            run("cuobjdump", "--list-elf", library),
            run("cuobjdump", "--list-ptx", library),
            archs,
            len(said),
        ),
        *check_hopper(run("cuobjdump", "-sass", "-arch", "sm_90a", library)),
        *check_symbols(run("nm", "-D", "--undefined-only", library)),
        *check_needed(run("readelf", "-d", library)),
        *check_dispatch(loaded, bindings),
    ]
    for problem in problems:
        print(f"cuda: {problem}")
    if problems:
        raise SystemExit(1)
    print(f"cuda: {len(spills)} kernels for {', '.join(archs)}; ops: {loaded.strip()}")


if __name__ == "__main__":
    main()
