"""The example on a folder with a model: experts are made once, and a run goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_gemma

from gemma_ext import pocket

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "mergebench.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mergebench_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = [document.text for document in pocket.documents(30_000)]
    return tiny_gemma.base(tmp_path_factory.mktemp("model"), texts)


def test_experts_learn_and_a_run_goes_on(example, folder, tmp_path, capsys):
    options = {
        "model": str(folder),
        "out": tmp_path / "out",
        "seeds": 1,
        "steps": 8,
        "rate": 1e-2,
        "context": 32,
        "windows": 4,
        "calibration": 4,
        "released": False,
        "device": "cpu",
    }
    example.main(only=["Model soup", "Fisher"], **options)
    printed = capsys.readouterr().out
    losses = [line for line in printed.splitlines() if "held-out loss" in line]
    assert len(losses) == len(pocket.DOMAINS)
    for line in losses:
        before, after = (float(words.split()[-1]) for words in line.split(","))
        assert after < before
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "experts").iterdir()}
    example.main(only=["Model soup", "Fisher", "RegMean++"], **options)
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "experts").iterdir()}
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    names = [json.loads(line)["algorithm"] for line in lines]
    assert names == ["base", "experts", "Model soup", "Fisher", "RegMean++"]
    assert "| Fisher |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "page.html").exists()


def test_windows_of_a_real_model_begin_as_its_texts_do(example, folder, tmp_path):
    recipe = example.ExpertRecipe(1, 1, 1e-3)
    makers = example.Makers(str(folder), tmp_path, recipe, 16, 3, "cpu", False)
    rows = makers.rows(makers.domain("gui").train)
    assert rows.shape[1] == 17
    assert (rows[:, 0] == makers.tokenizer.bos_token_id).all()
    assert makers.calibration("gui")[0].shape == (3, 17)
    assert makers.held_out(2).begin == makers.tokenizer.bos_token_id


def test_lm_eval_scores_by_questions_of_the_same_text_or_by_tasks_of_ones_own(
    example, folder, tmp_path
):
    out = tmp_path / "out"
    options = {"model": str(folder), "seeds": 1, "steps": 1, "context": 16, "calibration": 2}
    options |= {"released": False, "device": "cpu", "only": ["Model soup"]}
    example.main(out=out, questions=24, **options)
    questions, others = (
        (out / "tasks" / f"gui_{side}.jsonl").read_text().splitlines()
        for side in ("test", "validation")
    )
    assert len(questions) == len(others) == 24
    assert not set(questions) & set(others)
    assert all(len(set(json.loads(line)["options"])) == 4 for line in questions)
    lines = (out / "questions" / "results.jsonl").read_text().splitlines()
    scores = json.loads(lines[0])["scores"]
    assert set(scores) == set(pocket.DOMAINS)
    right = [24 * value for value in scores.values()]
    assert right == pytest.approx([round(value) for value in right])

    tasks = tmp_path / "tasks.yml"
    code = "{validation: {gui_validation: 'acc_norm,none'}, test: {gui_test: 'acc_norm,none'}}"
    text = f"domains: {{code: {code}}}\ngeneral: {{general_test: 'acc_norm,none'}}\n"
    tasks.write_text(text + "include: out/tasks\n")
    (expert,) = (out / "experts").glob("gui-*")
    example.main(out=tmp_path / "own", tasks=tasks, expert=[f"code={expert}"], **options)
    (soup,) = (x for x in (tmp_path / "own" / "results.jsonl").open() if "Model soup" in x)
    assert json.loads(soup)["normalised"] == {"code": 1.0}
    tasks.write_text(text + "limit: 3\n")
    odd = r"expected domains and general, got \['limit'\]"
    with pytest.raises(example.typer.BadParameter, match=odd):
        example.main(out=tmp_path / "own", tasks=tasks, expert=[f"code={expert}"], **options)
