"""Answers on disk: computed once, known again, kept through every kind of end."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from lm_models import causal, tokenizer
from test_causal import words

from gemma_ext.lm import HuggingFaceModel, Sampling, Store
from gemma_ext.lm.identity import identity

PROMPTS, TEXTS = words(11, 30, 30), words(12, 30, 8)


def lm_of(cache, model=None, **options) -> HuggingFaceModel:
    options = {"show_progress": False, "batch_tokens": 100, **options}
    return HuggingFaceModel(model or causal(), tokenizer(), cache=cache, **options)


class Counting:
    """How many sequences a model has run, and an interruption after some."""

    def __init__(self, lm, interrupt_after: int | None = None) -> None:
        self.rows, self.left = 0, interrupt_after
        lm.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.rows += len(kwargs["input_ids"])


def everything(lm) -> list[object]:
    return [
        *lm.logprobs(PROMPTS, TEXTS),
        *lm.choices(PROMPTS[:4], TEXTS[5:8]),
        *lm.perplexity([" ".join(TEXTS), ""]),
        *lm.generate(PROMPTS[:4], Sampling(5)),
        *lm.generate(PROMPTS[:2] * 2, Sampling(5, temperature=1.0)),
    ]


def assert_near(found, expected) -> None:
    """Equal but for what the batches that the rest is run in do to float32 sums."""
    for one, other in zip(found, expected, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-5)


def test_what_is_known_is_not_computed_again(tmp_path):
    plain = everything(lm_of(None))
    assert everything(lm_of(tmp_path / "new" / "answers.sqlite")) == plain
    again = lm_of(tmp_path / "new" / "answers.sqlite")
    counting = Counting(again)
    assert everything(again) == plain
    assert counting.rows == 0
    again.logprobs(["never"], ["seen"])
    assert counting.rows == 1


def test_an_interrupted_call_goes_on(tmp_path):
    expected = lm_of(None).logprobs(PROMPTS, TEXTS)
    interrupted = lm_of(tmp_path / "answers.sqlite")
    counting = Counting(interrupted, interrupt_after=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.logprobs(PROMPTS, TEXTS)
    assert 0 < counting.rows < len(PROMPTS)
    lm = lm_of(tmp_path / "answers.sqlite")
    rest = Counting(lm)
    assert_near(lm.logprobs(PROMPTS, TEXTS), expected)
    assert counting.rows + rest.rows == len(set(zip(PROMPTS, TEXTS, strict=True)))


def test_a_killed_process_loses_nothing_it_has_stored(tmp_path):
    path = tmp_path / "answers.sqlite"
    script = (
        "import time, test_lm_store\n"
        f"lm = test_lm_store.lm_of({str(path)!r})\n"
        "lm.model.register_forward_hook(lambda *_: time.sleep(0.05))\n"
        "lm.logprobs(test_lm_store.PROMPTS, test_lm_store.TEXTS)\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}
    )
    deadline = time.monotonic() + 100
    while _stored(path) < 5 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = _stored(path)
    assert 5 <= kept < len(PROMPTS)
    lm = lm_of(path)
    counting = Counting(lm)
    assert_near(lm.logprobs(PROMPTS, TEXTS), lm_of(None).logprobs(PROMPTS, TEXTS))
    assert counting.rows == len(set(zip(PROMPTS, TEXTS, strict=True))) - kept


def _stored(path: Path) -> int:
    if not path.exists():
        return 0
    with sqlite3.connect(path) as db:
        try:
            return db.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # the table is being made
            return 0


def test_a_changed_model_is_another(tmp_path):
    model = causal()
    lm = lm_of(tmp_path / "answers.sqlite", model)
    before = lm.logprobs(["abc"], ["xyz"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0
    after = lm.logprobs(["abc"], ["xyz"])
    assert after != before
    assert after == lm_of(None, model).logprobs(["abc"], ["xyz"])


def test_another_precision_is_another(tmp_path):
    lm = lm_of(tmp_path / "answers.sqlite")
    exact = lm.logprobs(["abc"], ["xyz"])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lm.logprobs(["abc"], ["xyz"])
    assert rounded != exact == lm.logprobs(["abc"], ["xyz"])
    assert rounded[0].token_logprobs == pytest.approx(exact[0].token_logprobs, abs=0.5)


def test_an_identity_is_that_of_weights_configuration_and_adapters():
    from peft import LoraConfig, get_peft_model

    assert identity(causal()) == identity(causal())
    named = causal()
    named.config._name_or_path = "elsewhere"
    assert identity(named) == identity(causal())
    others = [
        identity(causal(seed=1)),
        identity(causal().bfloat16()),
        identity(causal(final_logit_softcapping=5.0)),
        identity(causal(), window=3),
    ]
    stopping = causal()
    stopping.generation_config.eos_token_id = 7
    others.append(identity(stopping))
    adapted = get_peft_model(causal(), LoraConfig(target_modules=["q_proj"], r=2))
    others.append(identity(adapted))
    with adapted.disable_adapter():
        others.append(identity(adapted))
    assert len({*others, identity(causal())}) == len(others) + 1


def test_a_lora_model_is_scored_as_it_is_switched(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = causal()
    expected = lm_of(None, causal()).logprobs(["abc"], ["xyz"])
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    lm = lm_of(tmp_path / "answers.sqlite", get_peft_model(base, config))
    adapted = lm.logprobs(["abc"], ["xyz"])
    with lm.model.disable_adapter():
        assert lm.logprobs(["abc"], ["xyz"]) == expected
    assert lm.logprobs(["abc"], ["xyz"]) == adapted != expected


def test_a_file_that_is_no_store_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and longer than a header of sqlite" * 20)
    with pytest.raises(ValueError, match=r"notes.txt: expected a cache of answers, got file is"):
        Store(path)


def test_threads_and_processes_share_a_file(tmp_path):
    store, other = Store(tmp_path / "answers.sqlite"), Store(tmp_path / "answers.sqlite")

    def put_and_get(place: int) -> object:
        key = str(place).encode()
        (store if place % 2 else other).put([(key, place)])
        return other.get([key])[key]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(put_and_get, range(64))) == list(range(64))


def test_many_keys_at_once(tmp_path):
    store = Store(tmp_path / "answers.sqlite")
    keys = [str(i).encode() for i in range(1300)]
    store.put((key, [i, 0.1 + i]) for i, key in enumerate(keys))
    assert store.get([*keys, b"none"]) == {key: [i, 0.1 + i] for i, key in enumerate(keys)}
    store.close()
