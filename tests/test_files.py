"""Files and folders that are whole or absent, and refusals of what is no such file."""

import json
import os
from contextlib import suppress

import pytest
import torch

from gemma_ext import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stop(Exception):
    pass


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_takes_its_place_when_it_is_whole(tmp_path, before):
    path = tmp_path / "below" / "a.txt"
    if before is not None:
        files.write_text(path, before)
    with suppress(Stop), files.replacing(path) as beside:
        beside.write_text("half")
        raise Stop
    assert (path.read_text() if path.exists() else None) == before
    files.write_text(path, "ö\n")
    assert path.read_bytes() == "ö\n".encode()
    assert names(path.parent) == ["a.txt"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as one, files.replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last that ended
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "below" / "model"
    with suppress(Stop), files.new_folder(path) as beside:
        (beside / "half").write_text("")
        raise Stop
    assert names(path.parent) == []
    with files.new_folder(path) as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "a.txt").write_text("a")
        assert not path.exists()
    assert names(path.parent) == ["model"]
    assert (path / "deep" / "a.txt").read_text() == "a"


def test_a_folder_with_files_is_not_replaced(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with files.new_folder(path) as beside:  # an empty one is nobody's
        (beside / "a.txt").write_text("first")
    with pytest.raises(OSError), files.new_folder(path) as beside:
        (beside / "a.txt").write_text("second")
    assert (path / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["model"]


def test_what_gets_a_name_is_on_the_disk_before(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("named"), replace(*names)))
    files.write_text(tmp_path / "a.txt", "a")
    with files.new_folder(tmp_path / "model") as beside:
        (beside / "deep").mkdir()
        (beside / "deep" / "b.txt").write_text("b")
    parts = [tmp_path / "model" / "deep", tmp_path / "model" / "deep" / "b.txt"]
    file, above = (tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino
    assert done[:3] == [file, "named", above]
    assert set(done[3:-2]) == {part.stat().st_ino for part in parts}
    assert done[-2:] == ["named", above]


def test_only_a_folder_may_refuse_to_be_synced(tmp_path, monkeypatch):
    def refuses(handle):
        raise OSError(22, "no sync here")

    (tmp_path / "a.txt").write_text("a")
    files.sync(tmp_path / "a.txt")
    monkeypatch.setattr(os, "fsync", refuses)
    files.sync(tmp_path)
    with pytest.raises(OSError, match="no sync here"):
        files.sync(tmp_path / "a.txt")


def test_formats_come_back(tmp_path):
    value = {"a": [1, None], "b": "ö"}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    x = torch.arange(6.0).view(2, 3).T.requires_grad_()
    files.write_safetensors(tmp_path / "a.safetensors", {"x": x}, {"format": "pt"})
    assert torch.equal(files.read_safetensors(tmp_path / "a.safetensors")["x"], x)
    files.write_pickle(tmp_path / "a.pt", {"x": x.detach(), "n": 3})
    found = files.read_pickle(tmp_path / "a.pt")
    assert torch.equal(found["x"], x)
    assert found["n"] == 3


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_metrics(path) == []
    lines = [{"step": 1}, {"step": 2}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_text(text + '{"step": 3, "lo')
    assert files.read_metrics(path) == lines


def test_what_is_no_such_file_is_named(tmp_path):
    for read in (files.read_json, files.read_safetensors, files.read_pickle):
        with pytest.raises(ValueError, match=r"expected a file .*absent"):
            read(tmp_path / "absent")
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got list"):
        files.read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: expected JSON, got Expecting"):
        files.read_json(path)
    torch.save(Stop, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="expected tensors and plain values only"):
        files.read_pickle(tmp_path / "code.pt")
