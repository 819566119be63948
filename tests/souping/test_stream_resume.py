"""A merge that was stopped goes on, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stream_models import Deltas, Linear, Shrunk, files_of, load, rising, save, save_models

from gemma_ext.souping.engine.files.journal import NAME, Done, Journal
from gemma_ext.souping.engine.stream import merge_files

HERE = Path(__file__).parent


def run_killed_merges(folder: Path, rounds: int, seed: int) -> dict:
    command = [sys.executable, HERE / "killed_merges.py", folder, str(rounds), str(seed)]
    root = HERE.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_merges_end_in_the_same_bytes(tmp_path):
    found = run_killed_merges(tmp_path, rounds=9, seed=3)
    assert found["wrong"] == []
    assert found["killed"] >= 4


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fifty_killed_merges_end_in_the_same_bytes(tmp_path):
    found = run_killed_merges(tmp_path, rounds=50, seed=4)
    assert found["wrong"] == []
    assert found["killed"] >= 25
    assert found["resumed"] >= 5


class Stopped(Exception):
    pass


def stop(folder: Path) -> None:
    raise Stopped


@pytest.fixture
def stopped(tmp_path):
    """Sources and an output whose every tensor is done, but which has not got its name."""
    models, base = save_models(tmp_path, 2)
    with pytest.raises(Stopped):
        merge_files(Deltas(), models, base, rising(2), tmp_path / "out", finish=stop)
    assert not (tmp_path / "out").exists()
    return models, base, tmp_path / "out", tmp_path / "out.partial"


def run_again(stopped, method=None, **options) -> dict[str, bytes]:
    """The rest of the merge, compared with one of its own; which tensors were written anew."""
    models, base, out, _ = stopped
    merged = []

    class Watched(Deltas):
        def merge(self, part, state):
            merged.append(part.name)
            super().merge(part, state)

    merge_files(Watched(), models, base, rising(2), out, **options)
    fresh = merge_files(Deltas(), models, base, rising(2), out.with_name("fresh"))
    assert files_of(out) == files_of(fresh)
    assert not out.with_name("out.partial").exists()
    return set(merged)


def test_what_is_done_is_not_done_again(stopped):
    assert run_again(stopped) == set()


def test_torn_line_of_the_journal_is_done_again(stopped):
    journal = stopped[3] / NAME
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])
    kept = {json.loads(line)["name"] for line in lines[1:4]}
    names = {json.loads(line)["name"] for line in lines[1:]}
    assert run_again(stopped) == names - kept


def test_bytes_that_never_reached_the_disk_are_written_again(stopped):
    partial = stopped[3]
    path = partial / "model.safetensors"
    data = bytearray(path.read_bytes())
    norm = load(partial)["model.norm.weight"]
    at = data.index(norm.view(torch.uint8).numpy().tobytes())
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    assert run_again(stopped) == {"model.norm.weight"}


def test_lost_file_is_made_again(stopped):
    (stopped[3] / "model.safetensors").unlink()
    assert len(run_again(stopped)) == 7


def test_changed_source_starts_over(stopped):
    models = stopped[0]
    weights = load(models[0])
    weights["model.norm.weight"] += 1
    save(models[0], weights)
    assert len(run_again(stopped)) == 7


def test_another_layout_starts_over_without_the_old_files(stopped):
    models, base, out, partial = stopped
    (partial / "left.safetensors").write_bytes(b"")
    (partial / "folder").mkdir()
    merge_files(Linear(), models, base, rising(2), out, shard_bytes=1000)
    fresh = merge_files(Linear(), models, base, rising(2), out.with_name("fresh"), shard_bytes=1000)
    assert files_of(out) == files_of(fresh)


def test_another_size_of_files_starts_over(stopped):
    models, base, out, _ = stopped
    merge_files(Deltas(), models, base, rising(2), out, shard_bytes=1000)
    assert not (out / "model.safetensors").exists()
    assert len(list(out.iterdir())) > 2


def test_model_wide_surveys_run_again(tmp_path):
    models, _ = save_models(tmp_path, 1)
    method = Shrunk(model_wide=True)
    with pytest.raises(Stopped):
        merge_files(method, models, None, rising(1), tmp_path / "out", finish=stop)
    journal = tmp_path / "out.partial" / NAME
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    merge_files(method, models, None, rising(1), tmp_path / "out", chunk_bytes=30)
    fresh = merge_files(method, models, None, rising(1), tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(fresh)


def test_two_processes_do_not_write_one_output(tmp_path):
    models, _ = save_models(tmp_path, 1)

    def while_writing(folder: Path) -> None:
        with pytest.raises(BlockingIOError, match="another process is writing"):
            merge_files(Linear(), models, None, rising(1), tmp_path / "out")

    merge_files(Linear(), models, None, rising(1), tmp_path / "out", finish=while_writing)
    assert load(tmp_path / "out")


def test_failed_method_leaves_nothing(tmp_path):
    class Failing(Linear):
        def merge(self, part, state):
            raise ValueError("no such weight")

    models, _ = save_models(tmp_path, 1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no such weight"):
        merge_files(Failing(), models, None, rising(1), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_error_in_one_lane_ends_the_other(error, tmp_path):
    """A slow tensor beside the one that fails: the merge does not go on to the rest."""
    merged = []

    class Failing(Linear):
        def merge(self, part, state):
            merged.append(part.name)
            if part.name == "model.layers.0.mlp.up_proj.weight":
                raise error("no more")
            time.sleep(0.02)
            super().merge(part, state)

    models, _ = save_models(tmp_path, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(error, match="no more"):
            merge_files(Failing(), models, None, rising(1), tmp_path / "out", chunk_bytes=24)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(set(merged)) < 5
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == (error is not ValueError)


def test_journal_keeps_lines_of_its_own_key(tmp_path):
    first = Journal(tmp_path, "a")
    first.add(Done("x", 4, 2**64 - 1))
    first.add(Done("y", 8, 0))
    first.close()
    again = Journal(tmp_path, "a")
    assert again.done == {"x": Done("x", 4, 2**64 - 1), "y": Done("y", 8, 0)}
    again.forget("x")
    again.close()
    assert Journal(tmp_path, "b").done == {}
