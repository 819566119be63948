"""Fetch the packages that gpu-bench compares with into .peers/: `fetch_peers.py [--limit-mb 64]`.

Only wheels, and only what torch does not bring; a peer whose wheels would pass the limit is left
out. The wheels are for the Python of --python, which may be that of another machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".peers"
PEERS = {  # each with what it needs beyond torch, triton and numpy
    "cut-cross-entropy": (),
    "liger-kernel": ("packaging",),
    "quack-kernels": (
        "einops",
        "torch-c-dlpack-ext",
        "apache-tvm-ffi>=0.1.6,<0.2",
        "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base",
        "nvidia-cutlass-dsl-libs-cu13",
    ),
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-mb", type=float, default=64.0, help="for all wheels together")
    parser.add_argument("--python", default="3.12", help="version the wheels are for")
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    room = options.limit_mb * 2**20
    for peer, needs in PEERS.items():
        with tempfile.TemporaryDirectory(prefix="peers_") as name:
            folder = Path(name)
            reason = next(
                filter(None, (download(p, folder, options.python, room) for p in (peer, *needs))),
                None,
            )
            wheels = sorted(folder.glob("*.whl"))
            size = sum(wheel.stat().st_size for wheel in wheels)
            if reason is not None:
                print(f"{peer}: left out, {reason}")
                continue
            room -= size
            for wheel in wheels:
                zipfile.ZipFile(wheel).extractall(FOLDER)
            print(f"{peer}: {size / 2**20:.1f} MiB, {', '.join(w.name for w in wheels)}")
    return 0 if FOLDER.is_dir() else 1


def download(package: str, folder: Path, python: str, room: float) -> str | None:
    """Put a wheel into the folder; returns why that failed or that there is no room for it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, "-d", str(folder), package], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return f"{package} cannot be had: {lines[-1] if lines else 'pip failed'}"
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if size > room:
        return f"with {package} it needs {size / 2**20:.0f} MiB of {room / 2**20:.0f} that are left"
    return None


if __name__ == "__main__":
    sys.exit(main())
