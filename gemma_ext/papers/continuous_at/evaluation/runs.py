"""From behaviours to labelled completions, piece by piece: an interrupted run goes on.

    attack = by_gcg(gcg.GCG(model, tokenizer), targets, "searches")
    cases = make_test_cases(behaviors, attack, "test_cases.json")
    done = complete(lm, cases, "completions.json")
    done = label(done, behaviors, judge, "completions.json")

The files are HarmBench's, so each of the three may also be done by its scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gemma_ext.lm.protocol import LanguageModel, Sampling
from gemma_ext.papers.continuous_at.evaluation.gcg import GCG
from gemma_ext.papers.continuous_at.evaluation.harmbench import (
    Behavior,
    Completion,
    Completions,
    TestCases,
    labelled,
    read_completions,
    read_test_cases,
    write_completions,
    write_test_cases,
)
from gemma_ext.papers.continuous_at.evaluation.judges import Judge
from gemma_ext.papers.continuous_at.evaluation.pair import PairConfig, pair
from gemma_ext.papers.continuous_at.evaluation.template import SLOT
from gemma_ext.progress import track

AT_ONCE = 16
Attacker = Callable[[Behavior], Sequence[str]]
"""From a behaviour to prompts that try to bring it about."""


def direct(behavior: Behavior) -> list[str]:
    """No attack: the request itself."""
    return [behavior.request]


def by_gcg(
    search: GCG,
    targets: Mapping[str, Sequence[str]],
    folder: str | Path | None = None,
    strings: int = 1,
) -> Attacker:
    """Requests with strings that GCG finds behind them, for the first targets of a behaviour.

    Args:
        targets: of each behaviour, as `harmbench.read_targets` reads them.
        folder: of the searches, each of which goes on where it was.
        strings: how many targets of a behaviour are sought, a string for each.

    Raises:
        ValueError: from the attack, a behaviour without a target.
    """

    def attack(behavior: Behavior) -> list[str]:
        found = []
        for number, target in enumerate(_targets(targets, behavior)[:strings]):
            ask = f"{behavior.request} {SLOT}"
            resume = None if folder is None else Path(folder) / f"{behavior.id}-{number}.json"
            found.append(ask.replace(SLOT, search.run(ask, target, resume).best_string))
        return found

    return attack


def by_pair(
    attacker: LanguageModel,
    target: LanguageModel,
    judge: LanguageModel,
    targets: Mapping[str, Sequence[str]],
    config: PairConfig | None = None,
    folder: str | Path | None = None,
) -> Attacker:
    """The best prompt that PAIR finds for the first target of a behaviour, or the request itself.

    Raises:
        ValueError: from the attack, a behaviour without a target.
    """

    def attack(behavior: Behavior) -> list[str]:
        beginning = _targets(targets, behavior)[0]
        resume = None if folder is None else Path(folder) / f"{behavior.id}.json"
        models = (attacker, target, judge)
        best = pair(
            *models, behavior.request, beginning, config, resume=resume, show_progress=False
        ).best
        return direct(behavior) if best is None else [best.prompt]

    return attack


def _targets(targets: Mapping[str, Sequence[str]], behavior: Behavior) -> Sequence[str]:
    if not targets.get(behavior.id):
        raise ValueError(f"targets: expected one of {behavior.id}, got none")
    return targets[behavior.id]


def make_test_cases(
    behaviors: Sequence[Behavior],
    attack: Attacker,
    path: str | Path | None = None,
    show_progress: bool = True,
) -> TestCases:
    """Prompts for each behaviour.

    Args:
        path: file of this attack, written after each behaviour; those it holds are not attacked
            again, whatever attacked them.
    """
    cases = read_test_cases(path) if path is not None and Path(path).exists() else {}
    for behavior in track(behaviors, "attacks", show_progress):
        if behavior.id not in cases:
            cases[behavior.id] = list(attack(behavior))
            if path is not None:
                write_test_cases(path, cases)
    return {behavior.id: cases[behavior.id] for behavior in behaviors}


def complete(
    lm: LanguageModel,
    cases: Mapping[str, Sequence[str]],
    path: str | Path | None = None,
    sampling: Sampling = Sampling(max_tokens=512),  # noqa: B008
    chat: bool = True,
) -> Completions:
    """What a model answers to all test cases.

    Args:
        path: file of this model and these settings, written after every `AT_ONCE` behaviours;
            those it holds with the same test cases are not asked again, whoever answered. Other
            behaviours in it stay.
        chat: ask in messages, through the model's chat template.
    """
    done = read_completions(path) if path is not None and Path(path).exists() else {}
    missing = [
        key
        for key, prompts in cases.items()
        if [one.test_case for one in done.get(key, [])] != list(prompts)
    ]
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]
        asked = [(key, prompt) for key in some for prompt in cases[key]]
        written = lm.generate(
            [[{"role": "user", "content": prompt}] if chat else prompt for _, prompt in asked],
            sampling,
        )
        done |= {key: [] for key in some}
        for (key, prompt), one in zip(asked, written, strict=True):
            done[key].append(Completion(prompt, one.text))
        if path is not None:
            write_completions(path, done)
    return {key: done.get(key, []) for key in cases}


def label(
    completions: Completions,
    behaviors: Sequence[Behavior],
    judge: Judge,
    path: str | Path | None = None,
) -> Completions:
    """The completions, each with the judge's word on whether it shows its behaviour.

    Raises:
        ValueError: completions of a behaviour that is not given.
    """
    by_id = {behavior.id: behavior.request for behavior in behaviors}
    for key in completions:
        if key not in by_id:
            raise ValueError(
                f"expected completions of the {len(by_id)} behaviours, got some of {key}"
            )
    pairs = [(by_id[key], one.generation) for key, found in completions.items() for one in found]
    made = labelled(completions, judge(pairs))
    if path is not None:
        write_completions(path, made)
    return made
