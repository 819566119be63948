"""Real text that is on every machine: the running Python's standard library.

Each source file gives two documents, and no character is in both: its docstrings as prose (one
paragraph per documented name), and its code with those docstrings cut out. A file's content hash
decides its place in the order and the split it belongs to, so both documents of a file, and every
copy of it, are always on the same side.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_HELDOUT_PER_256 = 20  # about 8 % of the files
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
_TABLES = "encodings"  # character tables: neither English nor code anybody writes


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        path: POSIX path of the file, relative to the standard library.
        kind: "prose" (docstrings) or "code" (the source without them).
        split: "train" or "heldout".
        text: the text itself.
    """

    path: str
    kind: str
    split: str
    text: str


def documents(max_bytes: int | None = None, root: Path | None = None) -> list[Document]:
    """The corpus, ordered by content hash.

    Args:
        max_bytes: take training files until they hold this many bytes, and held-out files until
            they hold a tenth of it; None takes all.
        root: folder to read; the running Python's standard library by default.

    Raises:
        ValueError: there is no readable Python source below `root`.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    standard = root == Path(sysconfig.get_paths()["stdlib"])
    found: list[tuple[bytes, str, str]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _TEST_FOLDERS.intersection(relative.parts) or relative.parts[0] == _TABLES:
            continue
        if standard and relative.parts[0].removesuffix(".py") not in sys.stdlib_module_names:
            continue
        data = path.read_bytes()
        try:
            found.append((hashlib.sha256(data).digest(), relative.as_posix(), data.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    if not found:
        raise ValueError(f"root: expected a folder with Python sources, got {root}, which has none")

    texts: list[Document] = []
    room = {"train": max_bytes, "heldout": max_bytes // 10} if max_bytes is not None else None
    for digest, name, source in sorted(found):
        split = "heldout" if digest[-1] < _HELDOUT_PER_256 else "train"
        if room is not None:
            if room[split] <= 0:
                continue
            room[split] -= len(source)
        prose, code = split_docstrings(source)
        for kind, text in (("prose", prose), ("code", code)):
            if text.strip():
                texts.append(Document(name, kind, split, text))
    return texts


def corpus_digest(texts: list[Document]) -> str:
    """sha256 over every document's path, kind, split and text, in order."""
    digest = hashlib.sha256()
    for doc in texts:
        for field in (doc.path, doc.kind, doc.split, doc.text):
            data = field.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


@cache  # parsing the library takes seconds; its text is 20 MB
def split_docstrings(source: str) -> tuple[str, str]:
    """Takes the docstrings out of a module: (prose, code). What does not parse is all code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", source
    prose: list[str] = []
    cut: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        statement = node.body[0]
        prose.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
        alone = len(node.body) > 1 and statement.end_lineno < node.body[1].lineno
        if isinstance(node, ast.Module) or alone or len(node.body) == 1:
            cut.update(range(statement.lineno, statement.end_lineno + 1))
    lines = source.splitlines(keepends=True)
    code = "".join(line for number, line in enumerate(lines, 1) if number not in cut)
    return "\n\n".join(prose) + "\n" if prose else "", code
