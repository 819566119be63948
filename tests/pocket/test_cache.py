"""Files that are whole or absent, and a manifest that notices every change."""

import pytest
import torch

from gemma_ext.files import write_safetensors, write_text
from gemma_ext.pocket.cache import cache_dir, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    write_text(tmp_path / "a.txt", "one")
    write_safetensors(tmp_path / "b.safetensors", {"x": torch.arange(6).view(2, 3).T})
    write_manifest(tmp_path, report={"n": 1})
    return tmp_path


def test_manifest_of_untouched_files(folder):
    manifest = verify_manifest(folder)
    assert manifest["report"] == {"n": 1}
    assert sorted(manifest["files"]) == ["a.txt", "b.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.txt",
        "b.safetensors",
        "manifest.json",
    ]


def test_manifest_names_a_changed_file(folder):
    (folder / "a.txt").write_text("two")
    with pytest.raises(ValueError, match=r"a\.txt: expected sha256 .* remove .* made again"):
        verify_manifest(folder)


@pytest.mark.parametrize("change", ["add", "remove"])
def test_manifest_names_a_missing_or_added_file(folder, change):
    if change == "add":
        (folder / "c.txt").write_text("three")
    else:
        (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"[ac]\.txt: expected exactly the files"):
        verify_manifest(folder)


def test_cache_dir_prefers_its_own_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMA_EXT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GEMMA_EXT_CACHE")
    assert cache_dir() == tmp_path / "shared" / "gemma_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "gemma_ext"
