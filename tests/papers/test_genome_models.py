"""Real architectures: LoRA and whole checkpoints, from their folders to an evolved one."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from gemma_ext import cli
from gemma_ext.lm import HuggingFaceModel
from gemma_ext.papers.genome.command import read_config, run_config
from gemma_ext.papers.genome.compare import Row
from gemma_ext.papers.genome.evaluation import Job
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.models import Experts, ModelWorker
from gemma_ext.papers.genome.page import mean_interval, number, summaries, table, write_report
from gemma_ext.papers.genome.pool import load_adapters, load_checkpoints
from gemma_ext.papers.genome.recipe import Noise, applied, expert, from_table, mix, with_noise
from gemma_ext.papers.genome.tasks import Task, score

TEXT = [f"the {a} {b} the {c}. " for a in ("cat", "dog") for b in ("sees", "is") for c in "xyzuvw"]
CHOICE = [
    {"prompt": f"{x} is", "options": [" yes", " no", " maybe"], "answer": i % 3}
    for i, x in enumerate("abcdefgh")
]
LIKELIHOOD = Task("text", "likelihood", [{"text": t} for t in TEXT[:12]], [{"text": TEXT[20]}])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random Gemma-2 with its tokenizer, in a folder."""
    import tiny_gemma

    return tiny_gemma.base(tmp_path_factory.mktemp("base"), TEXT)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three LoRA adapters of it with random factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = []
    for i in range(3):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(model, lora)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.3)
        folders.append(tmp_path_factory.mktemp("adapter") / f"lora-{i}")
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def checkpoints(base, tmp_path_factory):
    """Two perturbed copies of it, in bfloat16."""
    from transformers import AutoModelForCausalLM

    folders = []
    for i in range(2):
        torch.manual_seed(i)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        folders.append(tmp_path_factory.mktemp("checkpoint") / f"full-{i}")
        model.save_pretrained(folders[-1])
        (folders[-1] / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
        name = "tokenizer_config.json"
        (folders[-1] / name).write_text((base / name).read_text())
    return folders


def language_model(model, base):
    from transformers import AutoTokenizer

    return HuggingFaceModel(model, AutoTokenizer.from_pretrained(base), show_progress=False)


def test_an_adapter_scores_as_peft_loads_it(base, adapters):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    worker = ModelWorker(Experts(str(base), tuple(map(str, adapters))), (LIKELIHOOD,))()
    seen = set()
    for order in ((0, 1, 2), (2, 0, 1)):  # what was resident before does not matter
        for i in order:
            model = AutoModelForCausalLM.from_pretrained(base)
            model = PeftModel.from_pretrained(model, adapters[i]).base_model.model
            want = score(language_model(model, base), [LIKELIHOOD])
            got = worker(Job(expert(i)))
            assert got == want
            seen.add(got.scores["text"])
    assert len(seen) == 3


def test_a_child_is_written_into_the_live_adapter(base, adapters):
    worker = ModelWorker(Experts(str(base), tuple(map(str, adapters))), (LIKELIHOOD,))()
    child = with_noise(mix([(expert(0), 0.3), (expert(2), 0.7)]), Noise(3, 0.5, 0.1))
    worker(Job(child))
    pool = load_adapters(adapters)
    want = worker.materialiser.tensors(child)
    assert set(want) == set(pool.shapes)
    assert all(torch.equal(worker.tensors[name], x) for name, x in want.items())
    product = applied("product", [(expert(0), 0.3), (expert(2), 0.7)])
    assert worker(Job(product)).scores != worker(Job(child)).scores
    assert len(pool.factors) * 2 == len(pool.shapes)


def test_a_checkpoint_scores_as_transformers_loads_it(base, checkpoints):
    from transformers import AutoModelForCausalLM

    worker = ModelWorker(Experts(str(base), (), tuple(map(str, checkpoints))), (LIKELIHOOD,))()
    for i in (1, 0):
        model = AutoModelForCausalLM.from_pretrained(checkpoints[i])
        want = score(language_model(model, base), [LIKELIHOOD])
        assert worker(Job(expert(i))) == want
    pool = load_checkpoints(checkpoints, base)
    away = worker(Job(mix([(expert(0), 1.0), (expert(1), -1.0)])))  # base + d0 - d1
    name = "model.embed_tokens.weight"
    want = (
        pool.base[name].double() + pool.experts[0][name].double() - pool.experts[1][name].double()
    )
    torch.testing.assert_close(worker.tensors[name].double(), want, rtol=2.0**-8, atol=1e-6)
    assert not math.isnan(away.scores["text"])


def test_experts_that_make_no_sense_are_refused(base, adapters, tmp_path):
    with pytest.raises(ValueError, match="either adapters or checkpoints"):
        Experts(str(base))
    with pytest.raises(ValueError, match="model: expected the model that the adapters are of"):
        Experts(None, ("a",))
    with pytest.raises(ValueError, match=r"adapters: expected adapter_config\.json in"):
        load_adapters([tmp_path])
    with pytest.raises(ValueError, match=r"checkpoints: expected model\.safetensors in"):
        load_checkpoints([tmp_path])
    other = tmp_path / "other"
    other.mkdir()
    for path in adapters[1].iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 8}))
    with pytest.raises(ValueError, match=r"expected lora_alpha 4 as in .*, got 8 in"):
        load_adapters([adapters[0], other])


def test_without_peft_the_extra_is_named(base, adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'gemma_ext\[genome\]'"):
        ModelWorker(Experts(str(base), tuple(map(str, adapters))), (LIKELIHOOD,))()


def configuration(folder, experts, **more):
    lines = [{"text": text} for text in TEXT]
    (folder / "text.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "choice.jsonl").write_text("".join(json.dumps(x) + "\n" for x in CHOICE))
    config = {
        "tasks": [
            {"name": "text", "kind": "likelihood", "file": "text.jsonl", "samples": 10},
            {"name": "choice", "kind": "choice", "file": "choice.jsonl", "samples": 5},
        ],
        "search": {"method": "genome+", "size": 3, "capacity": 3, "generations": 2, "seed": 1},
        "baselines": ["best parent", "ties"],
        "out": "out",
        **experts,
        **more,
    }
    path = folder / "evolve.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_configuration_becomes_an_adapter_and_a_page(base, adapters, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experts = {"model": str(base), "adapters": [str(x) for x in adapters]}
    path = configuration(tmp_path, experts)
    made = run_config(path, show_progress=False)
    methods = [one.method for one in made["summaries"]]
    assert methods == ["genome+", "best parent", "ties"]  # no vote: one task has no answers
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results] == methods
    assert all(row["used"] <= results[0]["used"] for row in results)
    model = AutoModelForCausalLM.from_pretrained(base)
    evolved = PeftModel.from_pretrained(model, made["best"]).base_model.model
    rows = json.loads(path.with_name("choice.jsonl").read_text().splitlines()[0])
    assert language_model(evolved, base).choices([rows["prompt"]], [rows["options"]])
    page = made["page"].read_text()
    assert "Fitness over evaluations" in page
    assert "<svg" in page
    evaluations = (tmp_path / "out" / "outcomes.jsonl").read_text()
    again = run_config(path, show_progress=False)
    assert again["summaries"][0].test[0] == made["summaries"][0].test[0]
    assert (tmp_path / "out" / "outcomes.jsonl").read_text() == evaluations
    with pytest.raises(ValueError, match="expected a run with this search"):
        run_config(path, compat="genome", show_progress=False)
    note = json.loads((made["best"] / "genome.json").read_text())
    assert note["genome"] == results[0]["genome"]
    recipe = from_table(note["recipes"])[note["genome"]]
    saved = load_adapters([made["best"]]).experts[0]
    want = Materialiser(load_adapters(adapters)).tensors(recipe)
    assert all(torch.equal(saved[name], x) for name, x in want.items())
    note["genome"] = "another"
    (made["best"] / "genome.json").write_text(json.dumps(note))
    run_config(path, show_progress=False)  # the best of a run that has gone on since
    assert json.loads((made["best"] / "genome.json").read_text())["genome"] == recipe.key


def test_whole_checkpoints_evolve_and_vote(base, checkpoints, tmp_path):
    from transformers import AutoModelForCausalLM

    experts = {"model": str(base), "checkpoints": [str(x) for x in checkpoints]}
    choice = [{"name": "choice", "kind": "choice", "file": "choice.jsonl", "samples": 5}]
    path = configuration(tmp_path, experts, tasks=choice, vote=2)
    made = run_config(path, show_progress=False)
    assert [one.method for one in made["summaries"]][1].startswith("genome+, vote of ")
    model = AutoModelForCausalLM.from_pretrained(made["best"])
    assert model.dtype == torch.bfloat16
    assert (made["best"] / "tokenizer.json").exists()


def test_the_command_line_says_what_it_does_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gemma-ext", "evolve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    assert call("--help") == 0
    help_text = capsys.readouterr().out
    assert "- experts/code" in help_text
    assert "--compat" in help_text
    path = tmp_path / "evolve.yml"
    path.write_text("tasks: [{name: a}]\nchekpoints: []\n")
    assert call(path) == 1
    sentence = capsys.readouterr().err
    assert sentence.startswith("gemma-ext evolve: ")
    assert "got 'chekpoints'" in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2]", "expected keys and values, got list"),
        ("a: [", "expected YAML, got"),
        ("model: x", "expected tasks, got none"),
        ("pool: x", "expected keys of model, .*got 'pool'"),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path, text, sentence):
    path = tmp_path / "evolve.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_config(path)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"name": "t", "kind": "choice"}, "tasks: expected the key 'file'"),
        ({"name": "t", "kind": "choice", "file": "choice.jsonl", "shots": 3}, "options of a task"),
    ],
)
def test_tasks_of_a_configuration_are_checked(base, adapters, tmp_path, task, sentence):
    experts = {"model": str(base), "adapters": [str(x) for x in adapters]}
    with pytest.raises(ValueError, match=sentence):
        run_config(configuration(tmp_path, experts, tasks=[task]), show_progress=False)


# Tables.


def row(method, test, used=10):
    return Row(method, used, 2 * test, test, {"t": test}, None, ((1, 0.0), (2, test)))


def test_leads_are_paired_by_seed():
    runs = [[row("genome", 1.0 + s), row("other", 0.5 + s + 0.01 * s)] for s in range(3)]
    search, other = summaries(runs)
    assert search.verdict == "itself"
    assert other.lead[0] == pytest.approx(0.49)
    # t(0.975, 2) = 4.303, standard deviation 0.01
    assert other.lead[1] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)
    assert other.verdict == "ahead"
    assert replace(other, lead=(-0.5, 0.1)).verdict == "behind"
    assert replace(other, lead=(0.1, 0.5)).verdict == "not decided"
    assert replace(other, lead=(0.1, math.nan)).verdict == "not decided"
    assert table([other])[0]["lead"].startswith("0.49 ± 0.025")
    with pytest.raises(ValueError, match="runs: expected the same methods"):
        summaries([runs[0], runs[0][:1]])


def test_intervals():
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)
    mean, width = mean_interval([3.0])
    assert (mean, math.isnan(width), number((mean, width))) == (3.0, True, "3")


def test_a_page_of_several_seeds(tmp_path):
    runs = [[row("genome", 1.0 + s), row("other", 0.5)] for s in range(2)]
    write_report(tmp_path / "p.html", runs, title="a <title>", facts={"model": "pocket"})
    page = (tmp_path / "p.html").read_text()
    assert "a &lt;title&gt;" in page
    assert "1.5 ±" in page
