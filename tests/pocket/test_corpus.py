"""The text: real, ordered, split by file, and nothing of it on both sides."""

import hashlib

import pytest

from gemma_ext.pocket.corpus import corpus_digest, documents, split_docstrings

SOURCE = '''"""About the module."""
import os


class Box:
    """Holds things."""

    size = 3

    def put(self, thing):
        """Puts one in."""
        return os.fspath(thing)


def empty(): "inline"
'''


def test_split_docstrings_takes_prose_out_of_code():
    prose, code = split_docstrings(SOURCE)
    assert (
        prose == "About the module.\n\nBox: Holds things.\n\nempty: inline\n\nput: Puts one in.\n"
    )
    assert "Holds" not in code
    assert "Puts" not in code
    assert "return os.fspath(thing)" in code


def test_split_docstrings_leaves_a_file_that_does_not_parse():
    assert split_docstrings("print 'python 2'\n") == ("", "print 'python 2'\n")


def test_documents_of_the_standard_library():
    texts = documents(300_000)
    assert texts == documents(300_000)
    assert {doc.kind for doc in texts} == {"prose", "code"}
    sides = {s: {doc.path for doc in texts if doc.split == s} for s in ("train", "heldout")}
    assert sides["train"]
    assert sides["heldout"]
    assert not sides["train"] & sides["heldout"]
    train = sum(len(doc.text) for doc in texts if doc.split == "train")
    assert train > 200_000
    assert not any("/tests/" in doc.path or doc.path.startswith("test/") for doc in texts)


def test_documents_follow_content_not_names(tmp_path):
    for name in ("b.py", "a.py", "folder/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"x = {len(name)}  # {'same' if name != 'b.py' else 'other'}\n")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe = 1\n")
    texts = documents(root=tmp_path)
    digests = [hashlib.sha256(doc.text.encode()).digest() for doc in texts]
    assert digests == sorted(digests)
    assert [doc.kind for doc in texts] == ["code"] * 3
    before = corpus_digest(texts)
    (tmp_path / "a.py").write_text("x = 1\n")
    assert corpus_digest(documents(root=tmp_path)) != before


def test_documents_refuses_a_folder_without_sources(tmp_path):
    with pytest.raises(ValueError, match="root: expected a folder with Python sources"):
        documents(root=tmp_path)
