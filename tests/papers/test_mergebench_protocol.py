"""The protocol with a scorer that reads the weights themselves: what is tuned, tested and timed."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from gemma_ext.papers.mergebench import page, protocol, scores
from gemma_ext.papers.mergebench.protocol import Book, Outcome, Pool

DOMAINS = ("a", "b")


class Model(nn.Module):
    def __init__(self, a, b, general=0.8):
        super().__init__()
        self.body = nn.Parameter(torch.tensor([a, b, general]))
        self.embed = nn.Parameter(torch.tensor([a, b]))


class Reader:
    """Scores are the weights; the test side scores lower, so that a mixed-up side shows."""

    domains = DOMAINS

    def __init__(self):
        self.asked = []

    def score(self, model, side, domains=None):
        self.asked.append((side, tuple(domains or DOMAINS)))
        factor = {"validation": 1.0, "test": 0.5}[side]
        return {d: factor * model.body[DOMAINS.index(d)].item() for d in domains or DOMAINS}

    def general(self, model):
        return {"general": float(model.body[2])}


@dataclass
class Share:
    """base + share * (mean of the experts - base)."""

    name: str = "share"
    grid: tuple = ({"share": 0.5}, {"share": 1.0}, {"share": 0.25})

    def prepare(self, pool, seed):
        return seed

    def merge(self, pool, prepared, config, seed):
        base = pool.weights(pool.base)
        experts = [pool.weights(m) for m in pool.experts.values()]
        mean = {n: sum(e[n] for e in experts) / len(experts) for n in base}
        return {n: base[n] + config["share"] * (mean[n] - base[n]) for n in base}


def make_pool(seed=0):
    return Pool(Model(0.2, 0.2), {"a": Model(0.8, 0.2, 0.6), "b": Model(0.2, 0.8, 0.6)}, {})


def test_the_best_configuration_of_the_validation_side_is_tested_once(tmp_path):
    reader = Reader()
    found = protocol.run(make_pool, [Share()], reader, [0], tmp_path)
    base, experts, merged = found
    assert merged.config == {"share": 1.0}
    assert merged.configurations == 3
    assert merged.scores == {"a": pytest.approx(0.25), "b": pytest.approx(0.25)}
    assert merged.performance == pytest.approx(0.5 / 0.8)
    assert merged.retention == pytest.approx(0.6 / 0.8)
    assert base.performance == pytest.approx(0.25)
    assert base.retention == 1.0
    assert experts.performance == 1.0
    assert [side for side, domains in reader.asked if domains == DOMAINS].count("test") == 2
    assert merged.seconds >= merged.merge_seconds + merged.validate_seconds > 0


def test_the_pool_stays_as_it_was(tmp_path):
    pool = make_pool()
    before = [p.clone() for m in (pool.base, *pool.experts.values()) for p in m.parameters()]
    protocol.run(lambda seed: pool, [Share()], Reader(), [0], tmp_path)
    after = [p for m in (pool.base, *pool.experts.values()) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_embeddings_are_left_out_unless_asked_for():
    pool = make_pool()
    assert set(pool.weights(pool.base)) == {"body"}
    whole = Pool(pool.base, pool.experts, {}, embeddings=True)
    assert set(whole.weights(pool.base)) == {"body", "embed"}
    assert protocol.left_out("model.embed_tokens.weight")
    assert protocol.left_out("lm_head.weight")
    assert not protocol.left_out("model.layers.0.mlp.up_proj.weight")


def test_one_configuration_needs_no_validation(tmp_path):
    reader = Reader()
    one = Share(grid=({"share": 0.5},))
    protocol.run(make_pool, [one], reader, [0], tmp_path)
    assert ("validation", DOMAINS) not in reader.asked


def test_a_run_goes_on_behind_the_last_outcome(tmp_path):
    first = protocol.run(make_pool, [Share()], Reader(), [0], tmp_path)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(lines) + lines[-1][:20])  # killed while writing

    class Never(Share):
        def merge(self, *args):
            raise AssertionError("merged again")

    assert protocol.run(make_pool, [Never()], Reader(), [0], tmp_path) == first
    assert path.read_text().splitlines(True) == lines
    both = protocol.run(make_pool, [Share()], Reader(), [0, 1], tmp_path)
    assert [o.seed for o in both] == [0, 0, 0, 1, 1, 1]


def test_outcomes_of_another_setting_are_no_part_of_a_run(tmp_path):
    given = {"windows": 4, "rate": 2e-5, "experts": ["x"]}
    first = protocol.run(make_pool, [Share()], Reader(), [0], tmp_path, setting=given)
    assert protocol.run(make_pool, [Share()], Reader(), [0], tmp_path, setting=given) == first
    for odd in ({**given, "windows": 8}, {"windows": 4, "rate": 2e-5}, None):
        with pytest.raises(ValueError, match=r"out: expected \w+ .* as in .*setting.json, got"):
            protocol.run(make_pool, [Share()], Reader(), [0], tmp_path, setting=odd)


def test_the_pool_has_the_scorers_domains(tmp_path):
    pool = make_pool()
    less = Pool(pool.base, {"a": pool.experts["a"]}, {})
    with pytest.raises(ValueError, match=r"pool: expected an expert of each of \['a', 'b'\]"):
        protocol.run(lambda seed: less, [Share()], Reader(), [0], tmp_path)


def test_an_empty_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="grid: expected share to have a configuration"):
        protocol.run(make_pool, [Share(grid=())], Reader(), [0], tmp_path)


def test_normalised():
    assert scores.normalised({"a": 0.5}, {"a": 0.5}) == {"a": 1.0}
    assert scores.normalised({"a": 0.0}, {"a": 0.5}) == {"a": 0.0}
    with pytest.raises(ValueError, match=r"scores: expected the tasks of the reference.*\['b'\]"):
        scores.normalised({"a": 0.5}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match=r"reference: expected a positive score of a, got 0\.0"):
        scores.normalised({"a": 0.5}, {"a": 0.0})


def test_turned():
    assert scores.turned(0.0) == 1.0
    assert scores.turned(1.0) == 0.0
    with pytest.raises(ValueError, match=r"rate: expected a number in \[0, 1\], got 1.5"):
        scores.turned(1.5)


def test_interval_is_students():
    found = scores.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302652729911275 / 3**0.5)
    assert scores.interval([1.0]).half == float("inf")
    assert str(scores.interval([1.0])) == "1.000"
    with pytest.raises(ValueError, match="values: expected at least one"):
        scores.interval([])


def test_ranks_share_places():
    assert scores.ranks({"x": 0.1, "y": 0.5, "z": 0.5}) == {"x": 3.0, "y": 1.5, "z": 1.5}


def test_table_and_page(tmp_path):
    better, worse = Share(), Share(name="less", grid=({"share": 0.1},))
    found = protocol.run(make_pool, [worse, better], Reader(), [0, 1, 2], tmp_path)
    table = page.rows(found)
    assert [row.algorithm for row in table] == ["base", "experts", "share", "less"]
    assert [row.rank and row.rank.mean for row in table] == [None, None, 1.0, 2.0]
    text = page.markdown(table)
    assert text.count("\n") == 6
    assert "| share | 1.000 ± 0.000 | 0.625 ± 0.000 | 0.750 ± 0.000 | 0.625 | 0.625 |" in text
    page.write(tmp_path / "page.html", table, "Numbers that read themselves.")
    html = (tmp_path / "page.html").read_text()
    assert "retention of general tasks" in html
    assert "Means over 3 seeds" in html
    assert html.count("1.000 ± 0.000") >= 3


def test_book_reads_back_what_it_wrote(tmp_path):
    book = Book(tmp_path / "book.jsonl")
    outcome = Outcome("x", 3, {"k": 1.0}, {"a": 0.5}, {"a": 1.0}, {"g": 1.0}, 1.0, 2.0, 3.0, 4)
    book.add(outcome)
    book.add(outcome)
    assert Book(tmp_path / "book.jsonl").done == {("x", 3): outcome}
    assert json.loads((tmp_path / "book.jsonl").read_text())["seed"] == 3
