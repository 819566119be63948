"""Who may lean on whom: reference, ops <- nn <- papers <- cli; no torch header in the kernels."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_ext"
EVERYWHERE = {"_version", "command_line", "extras", "files", "progress"}
CORE = {"ops", "nn", "reference", "_loader"}
# folder: what it may import besides itself; "gemma_ext" is the public face, which sits above nn
ALLOWED = {
    "reference": set(),
    "ops": {"reference", "_loader"},
    "nn": {"ops", "reference"},
    "papers": CORE | {"gemma_ext", "lm", "ppo", "sae", "souping", "report", "distributed"},
    "report": CORE | {"gemma_ext", "info"},
    "souping": CORE | {"gemma_ext", "_host", "report", "lm", "info"},
    "sae": CORE | {"gemma_ext", "lm", "report", "integrations", "pocket"},
    "ppo": CORE | {"gemma_ext", "lm", "report", "integrations", "pocket", "serve"},
    "lm": CORE | {"gemma_ext", "info"},
    "testing": CORE,
    "integrations": CORE | {"gemma_ext", "distributed"},
    "distributed": CORE | {"gemma_ext"},
    "pocket": CORE | {"gemma_ext"},
    "bench": CORE | {"gemma_ext", "testing", "pocket", "info"},
    "demo": CORE | {"gemma_ext", "pocket", "integrations", "bench", "info", "report"},
    "serve": CORE | {"gemma_ext", "_host", "distributed", "pocket"},
}
TORCH_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')


def imported_modules(path: Path) -> set[str]:
    """Dotted names inside gemma_ext that the file imports, at any depth of its code."""
    parents = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {submodule_or_module(module, alias.name) for alias in node.names}
    return {name for name in found if name.split(".")[0] == "gemma_ext"}


def submodule_or_module(module: str, name: str) -> str:
    place = ROOT / Path(*module.split("."), name)
    is_module = place.is_dir() or place.with_suffix(".py").is_file() or name == "_host"
    return f"{module}.{name}" if is_module else module


def layer(module: str) -> str:
    return [*module.split("."), "gemma_ext"][1]


def package_files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def test_every_folder_has_a_place_in_the_rule():
    folders = {p.relative_to(PACKAGE).parts[0] for p in package_files() if p.parent != PACKAGE}
    assert folders <= set(ALLOWED)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_lies_below_it(folder):
    files = [p for p in package_files() if p.relative_to(PACKAGE).parts[0] == folder]
    allowed = ALLOWED[folder] | EVERYWHERE | {folder}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported_modules(path)
        if layer(name) not in allowed
    }
    assert wrong == set()


def test_papers_do_not_import_each_other():
    for path in sorted((PACKAGE / "papers").rglob("*.py")):
        own = path.relative_to(PACKAGE / "papers").with_suffix("").parts[0]
        others = {
            name.split(".")[2]
            for name in imported_modules(path)
            if layer(name) == "papers" and name.count(".") >= 2
        }
        assert others <= {own}, path


def test_only_bindings_see_torch_headers():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu")]
    binding = ROOT / "csrc" / "common" / "torch"
    wrong = [
        str(path.relative_to(ROOT))
        for path in files
        if TORCH_INCLUDE.search(path.read_text())
        and binding not in path.parents
        and not path.name.endswith("ops.cpp")
    ]
    assert wrong == []
    assert list(binding.glob("*.cpp"))
