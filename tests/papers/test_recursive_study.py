"""The study: what it measures, the paper's orderings on the pocket, and its page."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from recursive_models import logits, tiny, tokens

from gemma_ext.nn.recursive import ExitHead, Plan
from gemma_ext.papers.recursive import Recipe, convert, grid, page
from gemma_ext.papers.recursive.study import (
    Bench,
    converted,
    exits,
    half_depth,
    non_embedding,
    vanilla,
)


def bench(**options):
    model = tiny("gemma2", layers=4, dtype=torch.float32)
    return Bench(
        model, tokens(12, 24), tokens(12, 7, seed=3), steps=2, exit_steps=2, batch=4, **options
    )


def test_nats_of_every_loop():
    b = bench()
    model = convert(b.model, Recipe(2, rank=2))
    nats = b.nats(model, batch=3)
    score = logits(model, b.held_out)[:, :-1].flatten(0, 1)
    truth = F.cross_entropy(score, b.held_out[:, 1:].flatten())
    assert nats[1] == pytest.approx(float(truth), rel=1e-5)
    assert nats[0] != nats[1]
    assert b.nats(b.model) == pytest.approx(
        [float(F.cross_entropy(logits(b.model, b.held_out)[:, :-1].flatten(0, 1),
                               b.held_out[:, 1:].flatten()))], rel=1e-5
    )  # fmt: skip
    model.exit_head = ExitHead(model.get_output_embeddings().weight, 3)
    torch.nn.init.normal_(model.exit_head.lora_B)
    changed = b.nats(model)
    assert changed[1] == pytest.approx(nats[1], rel=1e-6)
    assert changed[0] != pytest.approx(nats[0], rel=1e-3)


def test_parameters_outside_the_embedding():
    b = bench()
    embedding = b.model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in b.model.parameters())
    assert non_embedding(b.model) == total - embedding
    tied = convert(b.model, Recipe(2))
    norm = b.model.model.norm.weight.numel()
    assert 2 * (non_embedding(tied) - norm) == total - embedding - norm


def test_runs_give_their_records(tmp_path):
    b = replace(bench(), steps=2, exit_steps=2, batch=2)
    few = [name[:2] for name in grid.runs(b, 2, (2, 4, 8), 0, tmp_path, False)]
    rows = list(grid.runs(b, 2, (2, 4, 8), 0, tmp_path, True))
    names = [(table, row) for table, row, _, _ in rows]
    assert len(set(names)) == len(names)
    assert set(few) < set(names)
    tables: page.Tables = {}
    for table, row, _, make in rows:
        record = make(lambda count, note="": None)
        assert all(map(math.isfinite, record["nats"] + record["before"]))
        tables.setdefault(table, {}).setdefault(row, []).append(record)
    assert list(tables) == ["inits", "teacher", "controls", "exits"]
    start = b.measure(b.model)
    assert "| stepwise r=0 | average r=0 |" in page.markdown(tables, start)
    page.write(tmp_path / "page.html", tables, start, {"steps": "2"})
    html = (tmp_path / "page.html").read_text()
    assert "Early exits" in html
    assert "<svg" in html
    for name in tables:  # rows that were asked for may be of one table
        page.write(tmp_path / "page.html", {name: tables[name]}, start, {"steps": "2"})
        assert page.loops_of({name: tables[name]}) == 2
        assert next(iter(tables[name])) in page.markdown({name: tables[name]}, start)
    frozen = tables["exits"]["r=0, frozen, head LoRA"][0]
    assert frozen["nats"][-1] == pytest.approx(frozen["before"][-1], rel=1e-6)
    assert frozen["nats"][0] != frozen["before"][0]
    sizes = {name: records[0]["parameters"] for name, records in tables["inits"].items()}
    assert sizes["average r=2"] < sizes["average r=4"] < sizes["average r=8"]
    assert sizes["average r=4"] == sizes["stepwise r=4"] == sizes["average r=4 zero"]
    free = sizes["average r=4 from loop 2"]
    assert 2 * (free - sizes["average r=0"]) == sizes["average r=4"] - sizes["average r=0"]


def test_frozen_embeddings_stay(tmp_path):
    b = bench(freeze_embedding=True)
    model = convert(b.model, Recipe(2))
    b.fit(model, 0)
    assert torch.equal(model.get_input_embeddings().weight, b.model.get_input_embeddings().weight)
    assert non_embedding(model) < non_embedding(b.model)


def test_controls_keep_what_they_say():
    b = bench()
    assert half_depth(4, 2) == [0, 3]
    cut = vanilla(b, 0, layers=[0, 3], loops=1, fresh=False)
    tied = converted(b, Recipe(2, "stepwise"), 0)
    assert cut["parameters"] == tied["parameters"]
    assert len(cut["nats"]) == 1
    one, two = (vanilla(b, seed, layers=None, loops=2, fresh=True) for seed in (0, 1))
    assert one["before"] != two["before"]
    assert one["parameters"] == tied["parameters"]
    state = torch.get_rng_state()
    b.nats(b.model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fresh_control_has_the_embedding_that_stays():
    begun = []

    class Seen(Bench):
        def fit(self, model, *arguments, **options):
            begun.append(copy.deepcopy(model))
            return model

    for freeze in (True, False):
        b = Seen(**vars(bench(freeze_embedding=freeze)))
        vanilla(b, 5, layers=[0, 3], loops=1, fresh=True)
        found, source = begun[-1], b.model
        for end in ("get_input_embeddings", "get_output_embeddings"):
            kept = torch.equal(getattr(found, end)().weight, getattr(source, end)().weight)
            assert kept == freeze
        first = (model.model.layers[0].self_attn.q_proj.weight for model in (found, source))
        assert not torch.equal(*first)


def test_intervals_and_orderings():
    assert page.interval([2.0]) == "2"
    # t(0.975, 2) = 4.303, deviation 1, 3 seeds: 2.484
    assert page.interval([1.0, 2.0, 3.0]) == "2 ± 2.5"
    assert page.interval([2.0, 2.0]) == "2 ± 0"
    inits = {
        "stepwise r=0": [{"nats": [3.0, 1.0]}, {"nats": [3.0, 2.0]}],
        "average r=0": [{"nats": [3.0, 1.5]}, {"nats": [3.0, 2.5]}],
        "average r=8": [{"nats": [3.0, 1.5]}, {"nats": [3.0, 2.5]}],
        "average r=8 zero": [{"nats": [3.0, 1.0]}, {"nats": [3.0, 2.0]}],
    }
    assert page.ordering_rows(inits) == [
        ["stepwise r=0", "average r=0", "0.5 ± 0"],
        ["average r=8", "average r=8 zero", "-0.5 ± 0"],
    ]


@pytest.mark.slow
def test_the_papers_orderings_on_the_pocket(pocket_nano):
    """Stepwise before Average without matrices; Average's from the SVD before those from zero."""
    ids, held_out = pocket_nano.train_ids, pocket_nano.heldout_ids
    b = Bench(
        pocket_nano.model,
        ids[: 128 * 200].view(-1, 128),
        held_out[: 128 * 40].view(-1, 128),
        steps=12,
    )
    recipes = {
        "stepwise": Recipe(2, "stepwise"),
        "average": Recipe(2, "average"),
        "svd": Recipe(2, "average", rank=32),
        "zero": Recipe(2, "average", rank=32, lora_init="zero"),
    }
    nats = {name: converted(b, recipe, 0)["nats"][-1] for name, recipe in recipes.items()}
    assert nats["stepwise"] < nats["average"] - 0.02
    assert nats["svd"] < nats["zero"] - 0.02
    assert nats["svd"] < nats["stepwise"]


def test_exits_of_a_folder(tmp_path):
    b = bench()
    converted(b, Recipe(2, rank=2), 0, keep=tmp_path / "m")
    record = exits(b, tmp_path / "m", 0, grid.EXIT_OBJECTIVES["weighted"])
    assert len(record["before"]) == len(record["nats"]) == 2
    assert record["before"] != record["nats"]
    assert Plan.of_model(b.model).loops == 1
