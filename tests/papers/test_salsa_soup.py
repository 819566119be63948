"""Soups in memory: values, identities, refusals, folders."""

from __future__ import annotations

import json

import pytest
import torch
from salsa_toy import model, near
from torch import nn

from gemma_ext.papers import salsa


def parents(count=2, dtype=torch.float32):
    first = model(0, dtype)
    return [first, *(near(first, seed) for seed in range(1, count))]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [1.25, -0.5, 0.25]])
def test_a_soup_is_the_sum_rounded_once(dtype, weights):
    given = parents(3, dtype)
    made = salsa.soup(given, weights)
    row = weights or [1 / 3] * 3
    for name, parameter in made.named_parameters():
        held = [dict(p.named_parameters())[name].double() for p in given]
        exact = sum(w * x for w, x in zip(row, held, strict=True))
        eps = torch.finfo(dtype).eps
        bound = eps / 2 * exact.abs() + 4 * 2**-24 * sum(x.abs() for x in held)
        assert ((parameter.double() - exact).abs() <= bound + 1e-30).all(), name
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
    assert not made.training
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.lm_head.weight is not given[0].lm_head.weight


def test_into_fewer_bits_the_sum_is_rounded_once():
    given = parents(2)
    made = salsa.soup(given, [0.3, 0.7], dtype=torch.bfloat16)
    fine = salsa.soup(given, [0.3, 0.7])
    assert made.config.dtype == torch.bfloat16
    for coarse, exact in zip(made.parameters(), fine.parameters(), strict=True):
        assert torch.equal(coarse, exact.bfloat16())


def test_stochastic_rounding_is_right_on_average():
    given = parents(2)
    fine = salsa.soup(given, [0.3, 0.7]).lm_head.weight.double()
    options = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    made = [salsa.soup(given, [0.3, 0.7], seed=s, **options) for s in range(60)]
    mean = torch.stack([m.lm_head.weight.double() for m in made]).mean(0)
    nearest = salsa.soup(given, [0.3, 0.7], dtype=torch.bfloat16).lm_head.weight.double()
    assert (mean - fine).abs().mean() < 0.4 * (nearest - fine).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_one_is_the_first_parent_and_swapped_parents_make_the_same(dtype):
    one, two = parents(2, dtype)
    assert same(salsa.soup([one, two], [1.0, 0.0]), one)
    assert same(salsa.soup([one, two], [0.3, 0.7]), salsa.soup([two, one], [0.7, 0.3]))
    assert same(salsa.soup([one, one, one], [0.2, 0.5, 0.3]), one)


def test_layer_wise_weights():
    one, two = parents(2)
    weights = {"layer 0": [1.0, 0.0], "layer 1": [0.0, 1.0], "outside": [0.5, 0.5]}
    made = dict(salsa.soup([one, two], weights).named_parameters())
    mixed = dict(salsa.soup([one, two]).named_parameters())
    for name, parameter in made.items():
        source = one if ".layers.0." in name else two if ".layers.1." in name else None
        expected = mixed[name] if source is None else dict(source.named_parameters())[name]
        assert torch.equal(parameter, expected), name
    del weights["layer 1"]
    with pytest.raises(ValueError, match="expected weights of layer 1 for model"):
        salsa.soup([one, two], weights)


def test_into_a_parent_and_again():
    one, two = parents(2)
    expected = salsa.soup([one, two], [0.25, 0.75])
    salsa.soup_into(one, [one, two], [0.25, 0.75])
    assert same(one, expected)


def test_what_cannot_be_averaged_is_refused():
    one, two = parents(2)
    with pytest.raises(ValueError, match="at least one parent"):
        salsa.soup([])
    for weights, message in (
        ([1.0], "expected 2 numbers in weights, got 1"),
        ([0.5, 0.6], "to add up to 1, got 1.1"),
        ([float("nan"), 0.5], "to add up to 1, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            salsa.soup([one, two], weights)
    with pytest.raises(ValueError, match="to have the configuration of the first, not final_logit"):
        salsa.soup([one, model(1, final_logit_softcapping=20.0)])
    coarse = near(two, 4)
    coarse.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"in torch\.float32, got torch\.bfloat16"):
        salsa.soup([one, coarse])
    with pytest.raises(ValueError, match="to be a Gemma2ForCausalLM, got Linear"):
        salsa.soup([one, nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"expected weight of parents\[1\] to be \[2, 2\]"):
        salsa.soup([nn.Linear(2, 2), nn.Linear(3, 2)])
    with pytest.raises(ValueError, match="got bias more"):
        salsa.soup([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)])


def test_adapters_are_refused():
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model(0), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="without adapters, got some"):
        salsa.soup([tuned, tuned])


class Reader:
    def __init__(self, vocab=None, special=None, template=None):
        self.vocab, self.special_tokens_map = vocab or {"a": 0}, special or {}
        self.chat_template = template

    def get_vocab(self):
        return self.vocab


def test_tokenizers_have_to_agree():
    salsa.check_tokenizers([Reader(), Reader()])
    for other, what in (
        (Reader(vocab={"b": 0}), "vocabulary"),
        (Reader(special={"eos_token": "x"}), "special tokens"),
        (Reader(template="x"), "chat template"),
    ):
        with pytest.raises(ValueError, match=rf"expected the {what} of the first tokenizer in tok"):
            salsa.check_tokenizers([Reader(), other])


def test_a_folder_knows_where_it_comes_from(tmp_path):
    from transformers import AutoModelForCausalLM

    one, two = parents(2, torch.bfloat16)
    made = salsa.soup([one, two], [0.25, 0.75], rounding="stochastic", seed=5)
    entry = salsa.record(
        {"first": one, "second": two},
        [0.25, 0.75],
        made,
        rounding="stochastic",
        seed=5,
        checks={"loss": 1.5},
    )
    folder = salsa.save(tmp_path / "made" / "soup", made, entry)
    read = salsa.read_record(folder)
    assert read == json.loads((folder / "soup.json").read_text())
    assert read["alpha"] == 0.25
    assert read["weights"] == [0.25, 0.75]
    assert read["seed"] == 5
    assert (read["dtype"], read["compute"]) == ("bfloat16", "float32")
    assert read["parents"][1] == {"name": "second", "sha256": salsa.digest(two)}
    assert read["checks"] == {"loss": 1.5}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    salsa.verify(read, loaded, [one, two])
    assert [path.name for path in folder.parent.iterdir()] == ["soup"]
    with pytest.raises(ValueError, match="expected first with sha256"):
        salsa.verify(read, loaded, [two, one])
    with pytest.raises(ValueError, match="expected the soup with sha256"):
        salsa.verify(read, one)
    with pytest.raises(ValueError, match="a place where nothing is yet"):
        salsa.save(folder, made, entry)
    with pytest.raises(ValueError, match=r"expected soup.json in"):
        salsa.read_record(tmp_path)
    (tmp_path / "soup.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="expected format 1, got 2"):
        salsa.read_record(tmp_path)


def test_layer_wise_weights_and_three_parents_have_no_alpha():
    one, two, three = parents(3)
    made = salsa.soup([one, two, three])
    given = {"a": one, "b": two, "c": three}
    assert salsa.record(given, [0.5, 0.25, 0.25], made)["alpha"] is None
    weights = {"layer 0": [0.5, 0.5], "layer 1": [0.5, 0.5], "outside": [1.0, 0.0]}
    entry = salsa.record({"a": one, "b": two}, weights, made)
    assert entry["alpha"] is None
    assert entry["weights"]["outside"] == [1.0, 0.0]
    assert entry["seed"] is None


def test_a_digest_sees_names_bits_and_dtypes():
    one = model(0)
    known = salsa.digest(one)
    assert salsa.digest(near(one, 1, by=0.0)) == known
    other = near(one, 1, by=0.0)
    other.model.norm.weight.data[0] = torch.nextafter(
        other.model.norm.weight.data[0], torch.tensor(9.0)
    )
    assert salsa.digest(other) != known
    assert salsa.digest(near(one, 1, by=0.0).bfloat16()) != known
