"""One function over many jobs, wherever the workers are."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

from gemma_ext.distributed.fleet import open_fleet


def make_square():
    return square


def square(job):
    if job == "bad":
        raise ValueError("job: expected a number, got 'bad'")
    return job * job, os.getpid(), torch.get_num_threads()


def make_mortal(folder, times):
    def mortal(job):
        deaths = len(list(Path(folder).iterdir()))
        if job == 2 and deaths < times:
            (Path(folder) / str(deaths)).touch()
            os._exit(1)
        return job

    return mortal


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_in_the_order_of_the_jobs(workers):
    seen = {}
    with open_fleet(make_square, workers) as fleet:
        results = fleet.map([3, 1, 2, 5], lambda index, result: seen.update({index: result}))
        assert [value for value, _, _ in results] == [9, 1, 4, 25]
        assert seen == dict(enumerate(results))
        assert {threads for _, _, threads in results} == {1}
        assert all((pid == os.getpid()) == (workers == 0) for _, pid, _ in results)
        assert fleet.map([]) == []


def test_threads_of_this_process_are_given_back():
    before = torch.get_num_threads()
    with open_fleet(make_square, threads=before + 1) as fleet:
        assert fleet.map([1])[0][2] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_function_raises_comes_through(workers):
    with open_fleet(make_square, workers) as fleet:
        with pytest.raises(ValueError, match="job: expected a number"):
            fleet.map([1, "bad", 2])
        assert fleet.map([2])[0][0] == 4


def test_a_job_outlives_its_worker(tmp_path):
    with open_fleet(functools.partial(make_mortal, tmp_path, 1), 2) as fleet:
        assert fleet.map(list(range(5))) == list(range(5))


def test_a_job_that_kills_every_worker_is_given_up(tmp_path):
    with (
        open_fleet(functools.partial(make_mortal, tmp_path, 99), 1) as fleet,
        pytest.raises(RuntimeError, match="worker died 3 times"),
    ):
        fleet.map([2])


def test_workers_that_make_no_sense_are_refused():
    with (
        pytest.raises(ValueError, match="expected at least 0, got -1"),
        open_fleet(make_square, -1),
    ):
        pass
    with (
        pytest.raises(ValueError, match="expected at least 1 with ray, got 0"),
        open_fleet(make_square, 0, ray="local"),
    ):
        pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"pip install 'gemma_ext\[ray\]'"),
        open_fleet(make_square, 1, ray="auto"),
    ):
        pass
