"""The command: from names to a folder with model, history and report; errors in one sentence."""

import json
from types import SimpleNamespace

import pytest
import torch
import typer
from ppo_tiny import PROMPTS, adapted, random_sequences, tiny_model, tokenizer
from typer.testing import CliRunner

from gemma_ext import pocket
from gemma_ext.nn.ppo import AdapterCritic, SeparateCritic, SharedCritic, ValueHead
from gemma_ext.ppo import PPOConfig, Rewards, command, page
from gemma_ext.ppo.files import load_value_head, save_trained, save_value_head
from gemma_ext.ppo.opening import load_causal, open_parts
from gemma_ext.ppo.setup import ends_of

SMALL = [
    *("--total-episodes", "16", "--per-device-train-batch-size", "4"),
    *("--gradient-accumulation-steps", "2", "--response-length=5", "--learning-rate", "1e-3"),
    *("--num_ppo_epochs", "1", "--sample-prompts", "2", "--quiet"),
]


@pytest.fixture
def app():
    made = typer.Typer()
    made.command(context_settings=command.main.context_settings)(command.main)
    return made


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, prompts and rewards, worked in."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "rewards_of_the_command.py").write_text(
        "def length(completions, **columns):\n    return [len(text) / 10 for text in completions]\n"
        "def few(completions):\n    return [1.0]\n"
        "def words(completions):\n    return ['1'] * len(completions)\n"
        "def rows(completions):\n    return [[1.0]] * len(completions)\n"
        "def number(completions):\n    return 1.0\n"
        "def nothing(completions):\n    pass\n"
        "def right(completions, answers):\n    return [1.0] * len(answers)\n"
        "def wrong(completions):\n    return [int('x') for _ in completions]\n"
    )
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    (tmp_path / "long.txt").write_text("w3 " * 123 + "\nw4\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "w3"}]}\n')
    (tmp_path / "number.jsonl").write_text('{"prompt": 3}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(app, *arguments):
    return CliRunner().invoke(app, list(arguments))


GIVEN = ("tiny", "--prompts", "prompts.txt", "--reward", "rewards_of_the_command:length")


def test_run_leaves_model_history_and_report_and_goes_on(place, app):
    import transformers

    found = run(app, *GIVEN, "--out", "out", *SMALL)
    assert found.exit_code == 0, found.output
    lines = (place / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    html = (place / "out" / "report.html").read_text()
    for part in ("PPO of tiny", "<svg", "Responses before and after", "objective/kl", "1 length"):
        assert part in html
    samples = json.loads((place / "out" / "samples.json").read_text())
    assert len(samples["before"]) == len(samples["after"]) == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "out" / "model")
    assert model.config.vocab_size == 61
    assert load_value_head(place / "out" / "model").bias is not None
    assert "objective/scores" in found.output
    again = run(app, *GIVEN, "--out", "out", *SMALL)
    assert again.exit_code == 0, again.output
    assert (place / "out" / "history.jsonl").read_text().splitlines() == lines


def test_file_of_settings_under_flags(place, app):
    (place / "run.yaml").write_text(
        "model: tiny\nprompts: prompts.txt\nreward: [rewards_of_the_command:length]\n"
        "weight: [0.5]\nlora: 2\nvalue: adapter\ntotal-episodes: 800\nkl_coef: 0.3\nbf16: false\n"
    )
    found = run(app, "--config", "run.yaml", "--out", "out", *SMALL)
    assert found.exit_code == 0, found.output
    run_of = json.loads((place / "out" / "checkpoint.json").read_text())["run"]
    assert (run_of["kl_coef"], run_of["total_episodes"]) == (0.3, 16)
    assert (place / "out" / "model" / "value" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "prompts: expected one, got none"),
        ([*GIVEN, "--kl-cof", "1"], "expected settings of PPOConfig, got kl_cof"),
        ([*GIVEN, "--kl-coef", "much"], "kl_coef: expected a number, got 'much'"),
        ([*GIVEN, "--num-ppo-epochs", "1.5"], "num_ppo_epochs: expected a whole number, got '1.5'"),
        ([*GIVEN, "--bf16", "maybe"], "bf16: expected true or false, got 'maybe'"),
        ([*GIVEN, "--kl-coef", "none"], "kl_coef: expected a value, got none"),
        ([*GIVEN, "--value", "adapter"], "lora: expected a rank for a critic that is an adapter"),
        ([*GIVEN, "--value", "copy", "--lora", "2"], "expected shared or adapter beside adapters"),
        ([*GIVEN, "--value", "nowhere"], "value: expected shared, adapter, copy, a folder"),
        ([*GIVEN, "--dtype", "float3"], "dtype: expected auto, float32 or bfloat16, got 'float3'"),
        (["nowhere", *GIVEN[1:]], "expected a folder or hub id of a causal LM, got nowhere"),
        ([*GIVEN, "--config", "no.yaml"], "config: expected a file, got no.yaml"),
        ([*GIVEN, "stray", "more"], "expected a flag as --kl-coef, got"),
        ([*GIVEN, "--advantage", "td"], "advantage: expected one of gae, rloo, grpo, remax, reinf"),
        ([*GIVEN, "--kl-coef", "-1"], "kl_coef: expected at least 0, got -1.0"),
        (
            [*GIVEN, "--out", "prompts.txt"],
            "output_dir: expected a folder, got the file prompts.txt",
        ),
        ([*GIVEN, "--lora", "0"], "lora: expected a rank of at least 1, got 0"),
        ([*GIVEN, "--stop-token-id", "61"], "stop_token_id: expected an id below 61, got 61"),
        (
            [*GIVEN, "--response-length", "128"],
            "response_length: expected at most 127 in a model of 128 positions, got 128",
        ),
    ],
)
def test_errors_are_one_sentence(place, app, arguments, message):
    found = run(app, *arguments, "--quiet")
    assert found.exit_code == 1
    assert message in found.output.replace("\n", " ")
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("few", "rewards: expected 8 numbers of few, one for each response, got [1]"),
        ("words", "rewards: expected numbers or None of words, got '1' for response 0"),
        ("rows", "rewards: expected numbers or None of rows, got [1.0] for response 0"),
        ("number", "rewards: expected a list of numbers of number, got 1.0"),
        ("nothing", "rewards: expected a list of numbers of nothing, got None"),
        ("right", "expected the prompts to have the column answers, which right asks for, got pro"),
        ("wrong", "invalid literal for int() with base 10: 'x' (rewards_of_the_command.py, line 1"),
        ("gone", "reward: expected gone in rewards_of_the_command, got none"),
    ],
)
def test_rewards_that_are_none_are_one_sentence(place, app, reward, message):
    given = (*GIVEN[:-1], f"rewards_of_the_command:{reward}")
    found = run(app, *given, "--out", "out", *SMALL, "--sample-prompts", "0")
    assert found.exit_code == 1
    assert message in found.output.replace("\n", " ")
    assert "Traceback" not in found.output


def test_a_reward_that_is_no_python(place, app):
    found = run(app, *GIVEN[:-1], "broken_rewards:f", "--out", "out", *SMALL)
    assert found.exit_code == 1
    assert "reward: expected Python in broken_rewards, got invalid syntax" in found.output


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            "long.txt",
            "prompts: expected at most 123 tokens beside the 5 of a response in a model of 128 "
            "positions, got 124 in row 0; max_prompt_length cuts them",
        ),
        ("latin.txt", "prompts: expected UTF-8 in latin.txt, got"),
        ("chat.jsonl", "expected texts for a tokenizer without a chat template, got messages in"),
        ("number.jsonl", "prompts: expected a text or messages in row 0, got 3"),
    ],
)
def test_prompts_that_do_not_fit_are_one_sentence(place, app, prompts, message):
    given = ("tiny", "--prompts", prompts, *GIVEN[3:])
    found = run(app, *given, "--out", "out", *SMALL)
    assert found.exit_code == 1
    assert message in found.output.replace("\n", " ")


def test_long_prompts_are_cut_where_that_is_asked_for(place, app):
    given = ("tiny", "--prompts", "long.txt", *GIVEN[3:], "--max-prompt-length", "9")
    found = run(app, *given, "--out", "out", *SMALL)
    assert found.exit_code == 0, found.output


def test_no_card_and_no_end(place, app, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run(app, *GIVEN, "--device", "cuda", *SMALL)
    assert "device: expected cpu where torch sees no card, got cuda" in found.output
    model, words = tiny_model(), tokenizer()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = None
    words.eos_token = words.pad_token = None
    assert ends_of(PPOConfig(), model, words) == []
    assert ends_of(PPOConfig(stop_token_id=5, missing_eos_penalty=1.0), model, words) == [5]
    for given in ({"stop_token": "eos"}, {"missing_eos_penalty": 1.0}):
        (name,) = given
        with pytest.raises(ValueError, match=f"{name}: expected a model or tokenizer with a token"):
            ends_of(PPOConfig(**given), model, words)
    judge = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    with pytest.raises(ValueError, match="rewards: expected a tokenizer with a token of padding"):
        Rewards(judge, tokenizers=words)


def test_mistakes_in_a_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="expected names and values"):
        command.read_config(path)
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="expected YAML"):
        command.read_config(path)


def test_critics_by_name(place):
    def critic(value, **more):
        parts = open_parts(
            command.make_config({}),
            model="tiny",
            prompts=PROMPTS,
            reward="rewards_of_the_command:length",
            value=value,
            device="cpu",
            **more,
        )
        return parts.arguments["value"]

    assert isinstance(critic(None), SharedCritic)
    assert isinstance(critic("adapter", lora=2), AdapterCritic)
    assert isinstance(critic("copy"), SeparateCritic)
    assert isinstance(critic("tiny"), SeparateCritic)
    head = ValueHead(24)
    head.weight.data.normal_()
    save_trained(place / "kept", tiny_model(), SeparateCritic(tiny_model(), head), tokenizer())
    again = critic("kept/critic")
    assert again.head.weight.equal(head.weight)
    classifier = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    classifier.save_pretrained(place / "judge")
    assert critic("judge").head.weight.equal(classifier.score.weight)
    assert load_causal("tiny", "bfloat16", "cpu")[0].dtype.itemsize == 2


def test_files_of_heads(tmp_path):
    head = ValueHead(24, bias=False)
    head.weight.data.normal_()
    for names in ("trl", "classifier"):
        save_value_head(tmp_path / names, head, names=names)
        assert load_value_head(tmp_path / names).weight.equal(head.weight)
    with pytest.raises(ValueError, match="names: expected trl or classifier, got 'x'"):
        save_value_head(tmp_path, head, names="x")
    biased = ValueHead(24)
    biased.bias.data += 1
    with pytest.raises(ValueError, match="expected a head without a bias for classifier"):
        save_value_head(tmp_path, biased, names="classifier")
    old = tmp_path / "old"
    old.mkdir()
    torch.save({"v_head.summary.weight": head.weight.data}, old / "pytorch_model.bin")
    assert load_value_head(old).weight.equal(head.weight)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="in a file, got neither"):
        load_value_head(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected a folder, got nowhere"):
        load_value_head("nowhere")
    save_trained(tmp_path / "lora", adapted(tiny_model(), "value"), None, tokenizer())
    assert (tmp_path / "lora" / "model" / "policy" / "adapter_config.json").exists()


def test_page_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="history: expected at least one line, got none"):
        page.write(tmp_path / "p.html", [], title="", facts={})


def test_a_reward_that_is_an_adapter_of_the_model(place):
    """As trl's reward trainer leaves one: a sequence classification under peft."""
    peft = pytest.importorskip("peft")
    classifier = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    backbone = tiny_model().model.state_dict()
    classifier.model.load_state_dict(backbone)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(classifier, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.eval().save_pretrained(place / "judge")

    def opened(**more):
        return open_parts(
            command.make_config({}),
            model="tiny",
            prompts=PROMPTS,
            reward=["adapter:judge", "rewards_of_the_command:length"],
            device="cpu",
            **more,
        ).arguments

    arguments = opened(lora=2, value="adapter")
    trained = [n for n, p in arguments["policy"].named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trained} == {"policy", "value"}
    rewards = arguments["rewards"]
    assert rewards.names == ["reward", "length"]
    sequences = random_sequences(rows=3)
    found = rewards.functions[0].score_sequences(sequences)
    for row, length in enumerate(sequences.lengths.tolist()):
        end = sequences.prompt_width + length
        ids = sequences.ids[row, :end][sequences.mask[row, :end].bool()]
        wanted = made(input_ids=ids.unsqueeze(0)).logits[0, 0]
        torch.testing.assert_close(found[row], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="lora: expected a rank for a reward that is an adapter"):
        opened()
    lora.r = 3
    made.save_pretrained(place / "judge")
    config = json.loads((place / "judge" / "adapter_config.json").read_text())
    (place / "judge" / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(ValueError, match="reward: expected an adapter of the model in judge, got"):
        opened(lora=2)


def test_a_score_with_a_bias_is_written_back(place):
    classifier = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    classifier.score = torch.nn.Linear(24, 1)
    critic = SeparateCritic(classifier)
    with torch.no_grad():
        critic.head.weight.fill_(0.5)
        critic.head.bias.fill_(2.0)
    save_trained(place / "kept", tiny_model(), critic, tokenizer())
    assert float(classifier.score.bias) == 2.0
    assert bool((classifier.score.weight == 0.5).all())


def test_the_pocket_has_the_dtype_that_is_asked_for(monkeypatch):
    made = SimpleNamespace(model=tiny_model(), tokenizer=tokenizer())
    monkeypatch.setattr(pocket, "load", lambda size: made)
    assert load_causal("pocket", "bfloat16", "cpu")[0].dtype == torch.bfloat16
