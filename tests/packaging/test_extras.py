"""The extra that a missing package's sentence names brings that package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DISTRIBUTION = {"yaml": "pyyaml"}  # of an import name, where the two differ
BROUGHT = {
    "huggingface_hub": "transformers",
    "grpc": "ray[serve]",
}  # by which of their requirements


def packages(extra: str) -> set[str]:
    """Requirements of an extra and of the extras that it is made of, without versions."""
    found = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"gemma_ext\[(.+)\]", requirement)
        if own:
            found |= {name for part in own[1].split(",") for name in packages(part)}
        else:
            found.add(re.split(r"[<>=!~; ]", requirement)[0])
    return found


def required() -> list[tuple[str, str, str]]:
    """(file, extra, import name) of every call of `require` with plain names."""
    found = []
    for folder in ("gemma_ext", "python_examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                    extra, *names = [a.value for a in node.args[1:] if isinstance(a, ast.Constant)]
                    place = str(path.relative_to(ROOT))
                    found += [(place, extra, name) for name in names]
    return found


def test_an_extra_brings_what_its_sentence_promises():
    calls = required()
    assert len(calls) > 50
    for place, extra, name in calls:
        wanted = BROUGHT.get(name, DISTRIBUTION.get(name, name)).replace("_", "-")
        brought = {package.replace("_", "-") for package in packages(extra)}
        brought |= {package.split("[")[0] for package in brought}
        assert wanted in brought, f"{place}: {extra} does not bring {name}"


def test_every_extra_that_is_named_exists():
    pattern = re.compile(r"(?<!\w)gemma_ext\[([a-z,]+)\]")
    for folder in ("gemma_ext", "docs", "python_examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md"):
                for match in pattern.finditer(path.read_text(encoding="utf-8")):
                    assert set(match[1].split(",")) <= set(EXTRAS), f"{path}: {match[0]}"
