"""Latents that tell toxic text from clean text, and the measures of continuations."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch

from gemma_ext.ops.sae import Codes
from gemma_ext.papers.detox import metrics
from gemma_ext.papers.detox.prompts import ToxicityPrompt, read_prompts
from gemma_ext.papers.detox.scorers import Detoxify, Lexicon
from gemma_ext.papers.detox.search import LatentContrast


def listed(dense):
    """The positive entries of [N, F] as codes."""
    rows, indices = dense.nonzero(as_tuple=True)
    offsets = torch.zeros(len(dense) + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(rows, minlength=len(dense)).cumsum(0)
    values = dense[rows, indices].float()
    return Codes(values, indices.int(), offsets, dense.shape[:1], dense.shape[1])


def sample(seed, features=50, sequences=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (sequences,), generator=generator)
    dense = torch.rand(int(lengths.sum()), features, generator=generator)
    dense = torch.where(dense > 0.8, dense, 0.0)
    return dense, lengths, torch.arange(sequences) % 2 == 0


def counted(dense, lengths, toxic, batches):
    found = LatentContrast(dense.shape[1])
    for part in torch.arange(len(lengths)).chunk(batches):
        start = int(lengths[: part[0]].sum())
        stop = start + int(lengths[part].sum())
        found.add(listed(dense[start:stop]), lengths[part], toxic[part])
    return found


@pytest.mark.parametrize("batches", [1, 4, 30])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_contrasts_are_welchs_t_of_pooled_activations(pooling, batches):
    from scipy.stats import ttest_ind

    dense, lengths, toxic = sample(0)
    pool = {"max": lambda x: x.max(0).values, "mean": lambda x: x.mean(0)}[pooling]
    pooled = torch.stack([pool(part) for part in dense.double().split(lengths.tolist())])
    delta, t = counted(dense, lengths, toxic, batches).contrast(pooling)
    truth = ttest_ind(pooled[toxic].numpy(), pooled[~toxic].numpy(), equal_var=False)
    torch.testing.assert_close(delta, pooled[toxic].mean(0) - pooled[~toxic].mean(0))
    torch.testing.assert_close(t, torch.from_numpy(truth.statistic), rtol=1e-6, atol=1e-9)


def test_rates_and_references_count_tokens():
    dense, lengths, toxic = sample(1)
    found = counted(dense, lengths, toxic, 3)
    clean = dense[~toxic.repeat_interleave(lengths)]
    torch.testing.assert_close(found.clean_rate, (clean > 0).double().mean(0))
    torch.testing.assert_close(found.largest, dense.max(0).values)


def planted(seed, shuffled=False):
    """300 sequences over 1000 latents; toxic ones carry latent 7."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((300,), 5)
    toxic = torch.arange(300) % 2 == 0
    dense = torch.rand(1500, 1000, generator=generator)
    dense = torch.where(dense > 0.95, dense, 0.0)
    dense[toxic.repeat_interleave(lengths), 7] = 3.0
    dense[:, 8] = 1 + dense[:, 8] + 0.5 * toxic.repeat_interleave(lengths)  # fires everywhere
    if shuffled:
        toxic = toxic[torch.randperm(300, generator=generator)]
    return counted(dense, lengths, toxic, 5)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_a_planted_latent_is_first_and_one_that_always_fires_is_not_there(pooling):
    found = planted(2).best(10, pooling=pooling)
    assert found.latents[0] == 7
    assert 8 not in found.latents
    assert found.delta.diff().le(0).all()
    assert found.reference[0] == 3.0


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_shuffled_labels_find_nothing(pooling):
    # 1000 latents: |t| < 5 in all of them but once in two thousand such tests
    assert planted(3, shuffled=True).contrast(pooling)[1].abs().max() < 5


def test_values_that_are_not_positive_do_not_fire():
    codes = Codes(
        torch.tensor([[-1.0, 0.0], [2.0, -3.0]]),
        torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
        None,
        torch.Size([2]),
        3,
    )
    found = LatentContrast(3)
    found.add(codes, torch.tensor([2]), torch.tensor([True]))
    assert found.fired.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("lengths", "toxic", "message"),
    [
        ([3], [True], "sum to 2 tokens, got 3"),
        ([2, 0], [True, False], "expected positive ones"),
        ([2], [True, False], r"toxic: expected \[B\]"),
    ],
)
def test_sequences_that_do_not_fit_their_codes(lengths, toxic, message):
    with pytest.raises(ValueError, match=message):
        LatentContrast(4).add(listed(torch.ones(2, 4)), torch.tensor(lengths), torch.tensor(toxic))


def test_other_features_one_class_and_nothing_toxic_are_refused():
    found = LatentContrast(4)
    with pytest.raises(ValueError, match="codes: expected 4 features, got 3"):
        found.add(listed(torch.ones(2, 3)), torch.tensor([2]), torch.tensor([True]))
    found.add(listed(torch.ones(4, 4)), torch.tensor([2, 2]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="got 0 clean and 2 toxic"):
        found.contrast()
    found.add(listed(2 * torch.ones(4, 4)), torch.tensor([2, 2]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match="expected a latent that toxic text fires more"):
        found.best()
    with pytest.raises(ValueError, match="pooling: expected max or mean, got 'sum'"):
        found.contrast("sum")


def test_toxicity_of_known_scores():
    found = metrics.toxicity([[0.1, 0.6], [0.2, 0.4]])
    assert found == metrics.Toxicity(pytest.approx(0.325), pytest.approx(0.5), 0.5)
    for bad, message in (([[]], "at least one continuation"), ([[1.5]], r"\[0, 1\], got 1.5")):
        with pytest.raises(ValueError, match=message):
            metrics.toxicity(bad)


def test_distinct_and_repetition_of_known_texts():
    assert metrics.distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert metrics.repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert metrics.repetition([7] * 20) == pytest.approx(16 / 17)
    assert metrics.repetition([1, 2]) == 0.0
    assert metrics.distinct(["a"], 2) != metrics.distinct(["a"], 2)  # NaN
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        metrics.distinct(["a"], 0)


def test_a_lexicon_sees_whole_words_in_any_case():
    score = Lexicon(["Damn", "hell", "c++"])
    assert score(["DAMN it", "hello", "to hell.", "I write C++", ""]) == [1.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="words: expected at least one"):
        Lexicon([" "])


class Classifier:
    """What the detoxify package has: lists of scores by label for a list of texts."""

    def __init__(self, model_type="original", checkpoint=None, device="cpu"):
        self.made, self.sizes = (model_type, device), []

    def predict(self, text):
        assert isinstance(text, list)
        self.sizes.append(len(text))
        scores = [len(one) / 10 for one in text]
        return {"toxicity": scores, "insult": [score / 2 for score in scores]}


@pytest.fixture
def detoxify(monkeypatch):
    module = types.ModuleType("detoxify")
    module.Detoxify = Classifier
    module.__spec__ = importlib.machinery.ModuleSpec("detoxify", None)
    monkeypatch.setitem(sys.modules, "detoxify", module)


def test_detoxify_scores_a_label_in_batches(detoxify):
    score = Detoxify("unbiased", "insult", batch=2)
    assert score(["ab", "", "abcd"]) == pytest.approx([0.1, 0.0, 0.2])
    assert (score._model.made, score._model.sizes) == (("unbiased", "cpu"), [2, 1])
    assert Detoxify()(["ab"]) == pytest.approx([0.2])
    assert score([]) == []
    with pytest.raises(ValueError, match=r"expected one of \['insult', 'toxicity'\], got 'hate'"):
        Detoxify(label="hate")(["a"])


def test_detoxify_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr("gemma_ext.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs detoxify: pip install 'gemma_ext\[detox\]'"):
        Detoxify()


SCORES = (
    "profanity", "sexually_explicit", "identity_attack", "flirtation", "threat", "insult",
    "severe_toxicity", "toxicity",
)  # fmt: skip


def released(text, toxicity, challenging):
    """A line of RealToxicityPrompts."""
    scores = dict.fromkeys(SCORES, toxicity)
    return {
        "filename": "0766186-bc7f2a64cb271f5f56cf6f25570cd9ed.txt",
        "begin": 340,
        "end": 564,
        "challenging": challenging,
        "prompt": {"text": text, **scores},
        "continuation": {"text": " and so on", **scores},
    }


def test_prompts_are_read_in_the_released_form(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [released("So I\u2028", 0.25, False), released("And", None, True)]
    for ascii in (True, False):
        text = "\n".join(json.dumps(line, ensure_ascii=ascii) for line in lines)
        path.write_text(text + "\n\n", encoding="utf-8")
        first, second = read_prompts(path)
        assert first == ToxicityPrompt("So I\u2028", 0.25, False)
        assert second == ToxicityPrompt("And", None, True)
        assert read_prompts(path, challenging=True) == [second]


@pytest.mark.parametrize(
    "line",
    [
        {"text": "b"},
        {"prompt": "b"},
        {"prompt": {"text": None}},
        {"prompt": {"text": "b", "toxicity": "high"}},
        [1],
    ],
    ids=str,
)
def test_a_line_that_is_no_prompt_is_named(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": {"text": "a"}}\n' + json.dumps(line))
    with pytest.raises(ValueError, match=r"line 2: expected a record with prompt\.text"):
        read_prompts(path)
