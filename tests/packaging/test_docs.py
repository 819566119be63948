"""What the documentation names is there: files behind links, scripts, modules, make targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for folder in ("", "docs/**/", "benchmarks/", "benchmarks/results/", "csrc/**/")
    for path in ROOT.glob(f"{folder}*.md")
)


def found(pattern: str) -> Iterator[tuple[Path, str]]:
    """Every page and what the group of the pattern is there."""
    for page in PAGES:
        for match in re.finditer(pattern, page.read_text(encoding="utf-8"), re.MULTILINE):
            yield page, match[1]


def test_links_lead_to_files():
    links = [(page, to) for page, to in found(r"\]\(([^)#\s]+)") if "://" not in to]
    assert len(links) > 100
    assert [f"{page}: {to}" for page, to in links if not (page.parent / to).exists()] == []


def test_every_page_of_docs_is_linked():
    linked = {(page.parent / to).resolve() for page, to in found(r"\]\(([^)#\s]+)")}
    covered = {page for page in PAGES if page in linked or page.parent in linked}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages - covered == set()


def test_scripts_that_are_named_are_there():
    scripts = list(found(r"python3? ((?:benchmarks|python_examples|tests/\w+)/\w+\.py)"))
    assert len(scripts) > 50
    assert [f"{page}: {name}" for page, name in scripts if not (ROOT / name).is_file()] == []


def test_modules_that_are_imported_are_there():
    for page, name in found(r"^from (gemma_ext[\w.]*) import"):
        module = ROOT / name.replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__init__.py").is_file(), page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/gpu.md"])
def test_make_has_the_targets_that_are_named(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^\.PHONY: (.+)$", makefile, re.M))))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)`", (ROOT / page).read_text(encoding="utf-8")))
    assert named - targets == set()
