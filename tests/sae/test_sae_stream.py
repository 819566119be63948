"""Texts as rows, and activations in an order that any step can be taken up in."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from tiny_gemma2 import D, T, tiny_model, tiny_rows

from gemma_ext.sae import Activations, pack, read_texts
from gemma_ext.sae.tokens import rows_of


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class Letters:
    """A tokenizer of letters."""

    bos_token_id, eos_token_id = 2, 1

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Ids", (), {"input_ids": [3 + ord(c) - ord("a") for c in text]})


def keys(rows):
    return Counter(tuple(row.tolist()) for row in rows.flatten(1))


def stream(model, **options):
    options = {"batch": 32, "buffer": 100, "rows": 3} | options
    return Activations([model], ["1"], tiny_rows(40), **options)


def test_an_epoch_has_every_activation_of_its_blocks_once(model):
    s = stream(model, batch=15, buffer=105)  # blocks of 7 rows, 15 positions each
    assert (s.per_row, s.block_rows, s.blocks, s.steps_per_block) == (15, 7, 5, 7)
    epoch = torch.cat(list(islice(s.batches(), s.blocks * s.steps_per_block)))
    everything = torch.cat([s.block(i) for i in range(s.blocks)])
    assert keys(epoch) == keys(everything)
    used = s.tokens[s._order[:35]]
    assert torch.equal(s.activations(used)[:, 1:].flatten(0, 1), everything)
    second = torch.cat(list(islice(s.batches(s.blocks * s.steps_per_block), 35)))
    assert keys(second) == keys(everything)
    assert not torch.equal(second, epoch)


def test_batches_can_be_taken_up_anywhere(model):
    s = stream(model)
    every = list(islice(s.batches(), 40))
    for first in (0, 1, 2, 3, 17, 39):
        assert torch.equal(next(s.batches(first)), every[first])


def test_seeds_and_orders(model):
    a, b, c = (next(stream(model, seed=seed).batches()) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    block = stream(model).block(0)
    assert not torch.equal(next(stream(model).batches()), block[:32])


def test_ranks_share_the_blocks(model):
    whole = stream(model, batch=15, buffer=105)
    ranks = [stream(model, batch=15, buffer=105, rank=r, world=2) for r in (0, 1)]
    turns = [torch.cat(list(islice(r.batches(), 14))) for r in ranks]  # two blocks each
    first_four = torch.cat(list(islice(whole.batches(), 28)))
    assert keys(torch.cat(turns)) == keys(first_four)


def test_disk_gives_what_memory_gives(model, tmp_path):
    memory, disk = stream(model), stream(model, folder=tmp_path)
    for a, b in zip(islice(memory.batches(), 30), islice(disk.batches(), 30), strict=True):
        assert torch.equal(a, b)
    assert len(list(tmp_path.glob("block-*.safetensors"))) == disk.blocks
    again = stream(model, folder=tmp_path)
    object.__setattr__(again, "_places", [])  # nothing is run any more
    assert torch.equal(next(again.batches()), next(memory.batches()))
    with pytest.raises(ValueError, match="holds activations of something else"):
        stream(model, folder=tmp_path, seed=5)
    with pytest.raises(ValueError, match="holds activations of something else"):
        stream(tiny_model(1), folder=tmp_path)


def test_several_models_and_several_places(model):
    other = tiny_model(1)
    rows = tiny_rows(40)
    both = Activations([model, other], ["1", "1"], rows, batch=32, buffer=100)
    single = [Activations([m], ["1"], rows, batch=32, buffer=100) for m in (model, other)]
    batch = next(both.batches())
    assert batch.shape == (32, 2, D)
    for source, s in enumerate(single):
        assert torch.equal(batch[:, source], next(s.batches()))
    layers = Activations([model], ["0", "1"], rows, batch=32, buffer=100)
    assert torch.equal(next(layers.batches())[:, 1], next(single[0].batches()))
    assert layers.sources == 2


def test_bad_streams_are_refused(model):
    rows = tiny_rows(4)
    with pytest.raises(ValueError, match="models: expected at least one"):
        Activations([], ["1"], rows)
    with pytest.raises(ValueError, match="sites: expected one for each of 2 models, got 1"):
        Activations([model, model], ["1"], rows)
    with pytest.raises(ValueError, match=r"batch: expected at most 60 activations.*got 61"):
        Activations([model], ["1"], rows, batch=61)
    with pytest.raises(ValueError, match="skip: expected 0 to 15, got 16"):
        Activations([model], ["1"], rows, batch=1, skip=16)
    with pytest.raises(ValueError, match="tokens: expected 3 blocks for as many ranks"):
        Activations([model], ["1"], rows, batch=30, buffer=30, world=3)


def test_rows_start_with_bos_and_lose_no_token():
    rows = pack(["abc", "defgh", "ij"], Letters(), 4)
    # abc<eos>defgh<eos>ij<eos> in threes behind <bos>
    assert rows.tolist() == [[2, 3, 4, 5], [2, 1, 6, 7], [2, 8, 9, 10], [2, 1, 11, 12]]
    assert rows.dtype == torch.int32
    assert len(pack(["abc"] * 100, Letters(), 4, tokens=12)) == 4
    with pytest.raises(ValueError, match="text: expected at least 3 tokens, got 2"):
        pack(["a"], Letters(), 4)
    stream = torch.arange(10)
    assert rows_of(stream, 4, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert rows_of(stream, 4, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="text: expected at least 11 tokens, got 10"):
        rows_of(stream, 12, 0)


def test_texts(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n\n\nthree\n")
    assert list(read_texts(plain)) == ["one\ntwo\n", "three\n"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in ("x", "y")) + "\n\n")
    assert list(read_texts(lines)) == ["x", "y"]
    lines.write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected an object with a text"):
        list(read_texts(lines))
    with pytest.raises(ValueError, match="text: expected a file, hf:NAME or pocket"):
        list(read_texts(tmp_path / "nothing"))
    assert len(next(read_texts("pocket"))) > 0


def test_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert datasets is not None
    assert list(read_texts(f"hf:{folder}")) == ["x", "y"]
    assert T == 16
