"""Tokenizers of merges: unions that keep every id and special token, and chat templates."""

import pytest
from tiny_tokenizers import save_bpe, save_unigram

from gemma_ext.souping.recipes.chat import TEMPLATES, choose_template
from gemma_ext.souping.recipes.marks import RecipeError
from gemma_ext.souping.recipes.recipe import parse_recipe
from gemma_ext.souping.recipes.tokenizer import build_tokenizer, copy_files, load_tokenizer


def build(tmp_path, text, folders, base=0):
    recipe = parse_recipe(
        "merge_method: m\nmodels: ["
        + ", ".join(f"{{model: {tmp_path / name}}}" for name in folders)
        + f"]\n{text}",
        "r.yml",
    )
    tokenizers = [load_tokenizer(tmp_path / name) for name in folders]
    return build_tokenizer(recipe.tokenizer, recipe.models(), tokenizers, base=base), tokenizers


@pytest.fixture
def two(tmp_path):
    save_bpe(tmp_path / "a", ["soup", "stone"])
    save_bpe(tmp_path / "b", ["soup", "spoon"], ("<s>", "</s>", "<|im_end|>"))
    return tmp_path


def test_a_union_keeps_ids_and_cuts_text_as_the_base(two):
    union, (a, b) = build(two, "tokenizer_source: union", "ab")
    vocabulary = union.get_vocab()
    assert vocabulary.keys() == a.get_vocab().keys() | b.get_vocab().keys()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert a.get_vocab().items() <= vocabulary.items()
    text = "soup stone spoon"
    assert union.tokenize(text) == a.tokenize(text)
    assert union("soup<|im_end|>").input_ids == [
        vocabulary["soup"],
        vocabulary["<|im_end|>"],
    ]
    assert union.decode([vocabulary["spoon"]]) == "spoon"
    assert union.decode([vocabulary["<|im_end|>"]], skip_special_tokens=True) == ""
    assert (union.bos_token, union.eos_token) == ("<s>", "</s>")


def test_a_saved_union_is_the_same(two, tmp_path):
    union, _ = build(two, "tokenizer: {source: union}", "ab")
    union.save_pretrained(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.get_vocab() == union.get_vocab()
    text = "soup <|im_end|> spoon"
    assert again(text).input_ids == union(text).input_ids


def test_base_model_and_equal_vocabularies(two):
    base, (_, b) = build(two, "tokenizer_source: base", "ab", base=1)
    assert base is b
    model, _ = build(two, f"tokenizer_source: model:{two / 'b'}", "ab")
    assert model.get_vocab() == b.get_vocab()
    other = save_bpe(two / "c", ["cup"])
    elsewhere, _ = build(two, f"tokenizer_source: {two / 'c'}", "ab")
    assert elsewhere.get_vocab() == other.get_vocab()
    same, tokenizers = build(two, "tokenizer_source: union", "aa"[:1])
    assert same is tokenizers[0]


def test_tokens_of_rules_are_added(two):
    rules = "{<new>: {source: {kind: zero}}, <|im_end|>: {source: %s}}" % (two / "b")
    found, (a, _) = build(two, f"tokenizer: {{source: base, tokens: {rules}}}", "ab")
    count = len(a)
    assert found.get_vocab()["<new>"] == count
    assert found.get_vocab()["<|im_end|>"] == count + 1
    assert len(a) == count
    assert found("soup<new>soup").input_ids[1] == count


def test_unigram_unions(tmp_path):
    save_unigram(tmp_path / "a", ["<unk>", "s", "o", "so"])
    save_unigram(tmp_path / "b", ["<unk>", "s", "o", "os", "soso"])
    union, (a, b) = build(tmp_path, "tokenizer_source: union", "ab")
    assert union.get_vocab().keys() == a.get_vocab().keys() | b.get_vocab().keys()
    assert union.tokenize("soso") == a.tokenize("soso")


def test_what_has_no_tokenizer(two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a tokenizer beside the weights, got none"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="transformers cannot load the tokenizer") as error:
        load_tokenizer(tmp_path / "broken")
    assert "\n" not in str(error.value)
    panics = (two / "a" / "tokenizer.json").read_text().replace('"soup"', '"so"')
    (tmp_path / "broken" / "tokenizer.json").write_text(panics)
    with pytest.raises(ValueError, match="transformers cannot load the tokenizer"):
        load_tokenizer(tmp_path / "broken")
    with pytest.raises(RecipeError, match=r"r\.yml, line 3, tokenizer_source: .*got none"):
        build(two, f"tokenizer_source: {tmp_path / 'empty'}", "ab")


def test_files_are_copied_as_they_are(two, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (two / "a" / "model.safetensors").write_text("no")
    copy_files(two / "a", out)
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert "model.safetensors" not in names
    assert (out / "tokenizer.json").read_bytes() == (two / "a" / "tokenizer.json").read_bytes()


CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
            "### Instruction:\nBye\n\n### Response:\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]"),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
            "[|user|]Bye\n[|assistant|]",
        ),
    ],
)
def test_named_templates(two, name, expected):
    tokenizer = load_tokenizer(two / "a")
    tokenizer.chat_template = choose_template(name, [])
    got = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert got == expected
    assert name in TEMPLATES


def test_auto_takes_what_most_models_have():
    assert choose_template("auto", ["x", "y", None, "y"]) == "y"
    assert choose_template("auto", ["x", "y"]) == "x"
    assert choose_template("auto", [None]) is None
    assert choose_template(None, ["x"]) is None
    assert choose_template("{{ messages }}", ["x"]) == "{{ messages }}"
