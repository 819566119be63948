"""The same over two nodes of a Ray cluster on this machine."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from genome_run import run

from gemma_ext.distributed.fleet import open_fleet

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.slow


def make_square():
    return square


def square(job):
    if job == "bad":
        raise ValueError("job: expected a number, got 'bad'")
    return job * job, os.environ.get("RAY_NODE_ID") or ray.get_runtime_context().get_node_id()


def make_mortal(folder, times):
    def mortal(job):
        deaths = len(list(Path(folder).iterdir()))
        if job == 2 and deaths < times:
            (Path(folder) / str(deaths)).touch()
            os._exit(1)
        return job

    return mortal


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    memory = 80 << 20
    options = {"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    yield cluster.address
    cluster.shutdown()


def test_two_nodes_share_the_jobs(cluster):
    with open_fleet(make_square, 2, ray=cluster) as fleet:
        results = fleet.map([3, 1, 2, 5])
        assert [value for value, _ in results] == [9, 1, 4, 25]
        assert len({node for _, node in results}) == 2
        with pytest.raises(ValueError, match="job: expected a number"):
            fleet.map([1, "bad", 2])
        assert fleet.map([2])[0][0] == 4


def test_a_job_outlives_its_worker(cluster, tmp_path):
    with open_fleet(functools.partial(make_mortal, tmp_path, 1), 2, ray=cluster) as fleet:
        assert fleet.map(list(range(5))) == list(range(5))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cluster_gives_the_lineage_of_one_process(cluster, tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", workers=2, ray=cluster)
    here, there = ((tmp_path / x / "lineage.jsonl").read_bytes() for x in "ab")
    assert here == there
