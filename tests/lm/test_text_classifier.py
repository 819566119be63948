"""Sequence classifiers: labels by name, whatever their order and the batch."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gemma_ext.lm.classifier import TextClassifier  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "kind", "rude", "note"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def classifier(tokenizer, labels, problem_type=None, batch=32):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
        problem_type=problem_type,
    )
    model = transformers.BertForSequenceClassification(config)
    return TextClassifier(model, tokenizer, batch=batch)


TEXTS = ["kind note", "rude", "note note rude kind rude note", "?", "kind " * 100]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_each_text_has_the_probabilities_it_has_alone(tokenizer, batch):
    judge = classifier(tokenizer, ["b", "a", "c"], batch=batch)
    alone = [judge([text])[0] for text in TEXTS]
    for row, other in zip(judge(TEXTS), alone, strict=True):
        assert list(row) == ["b", "a", "c"]
        assert row == pytest.approx(other, abs=1e-5)
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-5)


def test_labels_follow_the_configuration(tokenizer):
    first, second = (classifier(tokenizer, names) for names in (["x", "y"], ["y", "x"]))
    assert first.probability(["rude"], "x") == second.probability(["rude"], "y")
    chosen = first.top(TEXTS)
    assert chosen == ["x" if row["x"] >= row["y"] else "y" for row in first(TEXTS)]
    with pytest.raises(ValueError, match="label: expected one of x, y, got 'z'"):
        first.probability(["rude"], "z")


@pytest.mark.parametrize(
    ("labels", "kind"), [(["toxic"], None), (["a", "b"], "multi_label_classification")]
)
def test_labels_that_may_hold_together_have_a_sigmoid_each(tokenizer, labels, kind):
    judge = classifier(tokenizer, labels, kind)
    inputs = tokenizer(["rude"], return_tensors="pt")
    logits = judge.model(**inputs).logits[0]
    assert list(judge(["rude"])[0].values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-6)


def test_what_is_not_a_list_of_texts_is_refused(tokenizer):
    judge = classifier(tokenizer, ["a", "b"])
    assert judge([]) == []
    with pytest.raises(TypeError, match="texts: expected a sequence of strings"):
        judge("rude")
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        classifier(tokenizer, ["a", "b"], batch=0)


@pytest.mark.parametrize(("kind", "most"), [("Bert", 12), ("Roberta", 12 - 2)])
def test_a_tokenizer_without_a_length_has_the_models(tokenizer, kind, most):
    """RoBERTa's positions begin behind that of the padding, which is token 1 in most of them."""
    from copy import deepcopy

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, pad_token_id=int(kind == "Roberta"),
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    free = deepcopy(tokenizer)
    free.model_max_length = int(1e30)
    judge = TextClassifier(model, free)
    whole, cut = ("kind rude " * length for length in (50, most // 2))
    assert judge([whole]) == judge([cut])
    assert judge([whole]) != judge(["kind rude " * (most // 2 - 1)])


def test_a_saved_classifier_loads(tokenizer, tmp_path):
    judge = classifier(tokenizer, ["a", "b"])
    judge.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert TextClassifier.load(tmp_path)(TEXTS) == judge(TEXTS)
