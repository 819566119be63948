"""lm-eval's own `hf` model and ours give the same numbers for tasks made of local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_models
import pytest
import yaml

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from gemma_ext.lm import Sampling, harness  # noqa: E402

TASKS = ("odd_ones", "passages", "next_line")
LIMIT = 24


@pytest.fixture(scope="module")
def folder(pocket_nano, tmp_path_factory) -> Path:
    """Questions of three kinds out of held-out text, and the model that they are put to."""
    place = tmp_path_factory.mktemp("tasks")
    ids = pocket_nano.heldout_ids[:9000].tolist()
    words = pocket_nano.tokenizer.decode(ids, skip_special_tokens=True).split("\n")
    lines = [line for line in words if len(line.split()) > 3]
    records = {
        "odd_ones": [
            {
                "before": line[: len(line) // 2],
                "options": [other[len(other) // 2 :] or " ." for other in lines[i : i + 4]],
            }
            for i, line in enumerate(lines[:LIMIT])
        ],
        "passages": [{"text": "\n".join(words[i * 30 : i * 30 + 30])} for i in range(6)],
        "next_line": [
            {"before": lines[i] + "\n" + lines[i + 1][: -len(lines[i]) // 2], "line": lines[i]}
            for i in range(8)
        ],
    }
    kinds = {
        "odd_ones": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{before}}",
            "doc_to_choice": "options",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "passages": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": m} for m in ("byte_perplexity", "bits_per_byte")],
        },
        "next_line": {
            "output_type": "generate_until",
            "doc_to_text": "{{before}}",
            "doc_to_target": "{{line}}",
            "generation_kwargs": {"until": ["\n\n", "("], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name in TASKS:
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records[name]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **kinds[name],
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(task))
    pocket_nano.model.save_pretrained(place / "model")
    pocket_nano.tokenizer.save_pretrained(place / "model")
    return place


def evaluate(folder: Path, name: str, **options):
    return lm_eval.simple_evaluate(
        model=name,
        model_args={
            "pretrained": str(folder / "model"),
            "device": "cpu",
            "dtype": "float32",
            "max_length": 128,
            **options,
        },
        batch_size=4,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


def test_numbers_are_those_of_lm_evals_own_model(folder, tmp_path):
    theirs = evaluate(folder, "hf")
    ours = evaluate(folder, "gemma_ext", show_progress=False, cache=str(tmp_path / "answers"))
    for task in TASKS:
        assert ours["results"][task].keys() == theirs["results"][task].keys()
        for metric, value in theirs["results"][task].items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours["results"][task][metric] == expected, (task, metric)
        for mine, his in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "odd_ones":
                for (logprob, greedy), (other, alike) in zip(
                    *(sample["filtered_resps"] for sample in (mine, his)), strict=True
                ):
                    assert float(logprob) == pytest.approx(float(other), rel=1e-5, abs=1e-4)
                    assert greedy == alike
            elif task == "passages":
                assert float(mine["filtered_resps"][0]) == pytest.approx(
                    float(his["filtered_resps"][0]), rel=1e-5
                )
            else:
                assert mine["resps"] == his["resps"]
    # the questions do tell: neither all right nor all wrong, and texts that are not empty
    assert 0 < theirs["results"]["odd_ones"]["acc,none"] < 1
    assert any(sample["resps"][0][0] for sample in theirs["samples"]["next_line"])


def model_of(folder: Path, **options) -> harness.GemmaExtLM:
    return harness.GemmaExtLM(
        str(folder / "model"), device="cpu", dtype="float32", show_progress=False, **options
    )


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({}, Sampling(256)),
        ({"until": "x", "max_gen_toks": 3}, Sampling(3, stop=("x",))),
        ({"until": ["x", ""], "max_new_tokens": 3}, Sampling(3, stop=("x",))),
        ({"do_sample": False, "temperature": 0.7}, Sampling(256)),
        ({"temperature": 0.7, "top_k": 4, "top_p": 0.5}, Sampling(256, 0.7, 4, 0.5)),
        ({"do_sample": True, "temperature": 0.7}, Sampling(256, 0.7)),
        ({"do_sample": True}, None),
        ({"num_beams": 2}, None),
    ],
)
def test_requests_to_generate_are_understood_or_left_to_lm_eval(folder, asked, sampling):
    assert model_of(folder)._sampling(asked) == sampling


def test_answers_reach_lm_evals_own_cache_and_ours(folder, tmp_path):
    from lm_eval.api.instance import Instance

    lm = model_of(folder, cache=str(tmp_path / "answers"))
    kept = {}
    lm.cache_hook.add_partial = lambda kind, args, answer: kept.update({(kind, str(args)): answer})

    def asked(kind, *args):
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0)]

    score = lm.loglikelihood(asked("loglikelihood", "def ", "main"))
    total = lm.loglikelihood_rolling(asked("loglikelihood_rolling", "def main"))
    text = lm.generate_until(asked("generate_until", "def ", {"max_gen_toks": 4}))
    beams = lm.generate_until(asked("generate_until", "x", {"max_gen_toks": 4, "num_beams": 2}))
    assert list(kept.values()) == [*score, *total, *text, *beams]
    lm.lm.model.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert lm.loglikelihood(asked("loglikelihood", "def ", "main")) == score
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", "def main")) == total
    assert lm.generate_until(asked("generate_until", "def ", {"max_gen_toks": 4})) == text


@pytest.mark.parametrize("batch_size", [1, 5])
def test_encoder_decoders_score_as_in_lm_eval(batch_size):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from test_encoder_decoder import model_of as seq2seq

    draw = [(word * 3, " " + word[::-1]) for word in ("abc", "x y", "blxyz", "q", "")]
    model, text = seq2seq("T5"), lm_models.tokenizer(bos=False, eos=True)
    pairs = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(draw)]
    texts = [Instance("loglikelihood_rolling", {}, pair[1:], i) for i, pair in enumerate(draw)]
    theirs = HFLM(model, tokenizer=text, batch_size=batch_size, max_length=64)
    ours = harness.GemmaExtLM(model, tokenizer=text, max_length=64, show_progress=False)
    for (one, greedy), (other, alike) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)
        assert greedy == alike
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), rel=1e-5
    )


def test_mixed_precision_is_that_of_lm_eval(folder):
    from lm_eval.models.huggingface import HFLM

    words = model_of(folder).tok_encode("def main(self):\n        return self.name")
    asked = [(None, words[:6], words[6:])]
    options = {"device": "cpu", "dtype": "float32", "mixed_precision_dtype": "bfloat16"}
    ((theirs, _),) = HFLM(str(folder / "model"), **options)._loglikelihood_tokens(asked, True)
    ((ours, _),) = model_of(folder, mixed_precision_dtype="bfloat16")._loglikelihood_tokens(asked)
    ((exact, _),) = model_of(folder)._loglikelihood_tokens(asked)
    assert ours == pytest.approx(theirs, abs=0.05 * len(words))
    assert ours != exact


@pytest.mark.slow
def test_the_command_line_is_that_of_lm_eval(folder, tmp_path):
    command = [
        *(sys.executable, "-m", "gemma_ext.lm", "run", "--model", "gemma_ext"),
        *("--model_args", f"pretrained={folder / 'model'},dtype=float32,max_length=128"),
        *("--tasks", "odd_ones", "--include_path", str(folder), "--limit", "3", "--device", "cpu"),
        *("--output_path", str(tmp_path / "out")),
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "gemma_ext"
    assert 0 <= results["results"]["odd_ones"]["acc,none"] <= 1
