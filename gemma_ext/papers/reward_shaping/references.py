"""Reference responses: drawn once from the policy before training, scored, kept and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma_ext.files import replacing
from gemma_ext.lm import LanguageModel, Sampling
from gemma_ext.papers.reward_shaping.hooks import COLUMN, RewardFunction
from gemma_ext.progress import track

# of the study: ten responses, 512 tokens, temperature and top_p 0.9, top_k 50
SAMPLING = Sampling(max_tokens=512, temperature=0.9, top_k=50, top_p=0.9)
COUNT = 10
TEXTS = "ref_completions"


@dataclass(frozen=True)
class References:
    """What the policy before training writes to a prompt.

    Attributes:
        completions: M responses.
        rewards: their scores, without a length penalty.
        lengths: their tokens, the end of those that have one included.
    """

    prompt: str
    completions: tuple[str, ...]
    rewards: tuple[float, ...]
    lengths: tuple[int, ...] | None = None

    def penalised(self, length_penalty: tuple[float, float] | None) -> tuple[float, ...]:
        """Scores with the penalty that the rewards of a rollout get.

        Raises:
            ValueError: the lengths are not known.
        """
        if length_penalty is None:
            return self.rewards
        if self.lengths is None:
            raise ValueError(f"references: expected lengths of {self.prompt!r}, got none")
        start, weight = length_penalty
        return tuple(
            r - weight * max(0.0, tokens - start)
            for r, tokens in zip(self.rewards, self.lengths, strict=True)
        )


def fingerprint(
    policy: str,
    reward: str,
    sampling: Sampling = SAMPLING,
    count: int = COUNT,
    template: str | None = None,
) -> str:
    """What references depend on, as one digest.

    Args:
        policy, reward: digests of the models (`RewardModel.fingerprint`,
            `gemma_ext.lm.identity`), or names that change with them.
        template: that turns a prompt into text.
    """
    parts = {
        "policy": policy,
        "reward": reward,
        "sampling": dataclasses.asdict(sampling),
        "count": count,
        "template": template,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def draw_references(
    prompts: Sequence[str],
    policy: LanguageModel,
    reward: RewardFunction,
    path: str | Path,
    identity: str,
    *,
    count: int = COUNT,
    sampling: Sampling = SAMPLING,
    batch: int = 64,
    show_progress: bool = True,
) -> list[References]:
    """M responses of each prompt and their scores, from the file as far as it has them.

    Args:
        policy: before training; references of the policy in training would hold PAR at one half.
        reward: called with `prompts` and `completions` by name alone, no ids.
        path: JSON lines, rewritten after every batch of prompts.
        identity: of `fingerprint`.

    Raises:
        ValueError: the file has references of another identity; a score that is not finite.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    path = Path(path)
    known = {r.prompt: r for r in read_references(path, identity)} if path.exists() else {}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    starts = range(0, len(missing), batch)
    for start in track(starts, "drawing references", show_progress and bool(missing)):
        some = missing[start : start + batch]
        rows = [prompt for prompt in some for _ in range(count)]
        drawn = policy.generate(rows, sampling)
        texts = [completion.text for completion in drawn]
        found = torch.as_tensor(reward(prompts=rows, completions=texts)).double().tolist()
        if not all(map(math.isfinite, found)):
            bad = next(at for at, score in enumerate(found) if not math.isfinite(score))
            raise ValueError(
                f"reward: expected finite scores, got {found[bad]} for {texts[bad]!r} to "
                f"{rows[bad]!r}"
            )
        for at, prompt in enumerate(some):
            own = slice(at * count, (at + 1) * count)
            # the end counts, as it does in a rollout
            lengths = tuple(c.tokens + (c.finished and not sampling.stop) for c in drawn[own])
            known[prompt] = References(prompt, tuple(texts[own]), tuple(found[own]), lengths)
        write_references(path, known.values(), identity)
    return [known[prompt] for prompt in prompts]


def write_references(path: str | Path, rows: Iterable[References], identity: str) -> None:
    """JSON lines behind a line with the identity."""
    lines = [json.dumps({"identity": identity})]
    lines += [json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rows]
    with replacing(Path(path)) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_references(path: str | Path, identity: str) -> list[References]:
    """Raises a ValueError where the file is of another identity: scores would not compare."""
    # not splitlines, which also ends a line at U+2028 and its like inside of a text
    first, *lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    held = json.loads(first).get("identity")
    if held != identity:
        raise ValueError(
            f"{path}: expected references of {identity[:12]}, got stale ones of {str(held)[:12]}; "
            "policy, reward model, template or sampling has changed"
        )
    return [_row(json.loads(line)) for line in lines]


def read_study(path: str | Path, *, penalised: bool = False) -> list[References]:
    """The file of the reference implementation: a JSON list with `sample0_text`, ...

    Args:
        penalised: take `sample_rewards`, which include the study's length penalty, in place of
            `sample_original_rewards`.

    Raises:
        ValueError: a row without scores, or with another number of texts.
    """
    key = "sample_rewards" if penalised else "sample_original_rewards"
    found = []
    for at, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        if key not in row:
            raise ValueError(f"{path}: expected {key!r} in row {at}, got {sorted(row)}")
        texts = tuple(
            row[f"sample{m}_text"] for m in range(len(row[key])) if f"sample{m}_text" in row
        )
        if len(texts) != len(row[key]):
            raise ValueError(
                f"{path}: expected {len(row[key])} sampled texts in row {at}, got {len(texts)}"
            )
        found.append(References(row["prompt"], texts, tuple(map(float, row[key]))))
    return found


def add_columns(
    data: Any,
    references: Sequence[References],
    *,
    length_penalty: tuple[float, float] | None = None,
    prompt: str = "prompt",
) -> Any:
    """A `datasets.Dataset` with `ref_rewards` and `ref_completions` of each row's prompt.

    Args:
        length_penalty: of the rollouts, which references get too.
        prompt: name of the column.

    Raises:
        ValueError: a prompt has no references.
    """
    known = {row.prompt: row for row in references}
    rows = []
    for at, text in enumerate(data[prompt]):
        if text not in known:
            raise ValueError(f"references: expected some of the prompt of row {at}, got none")
        rows.append(known[text])
    data = data.add_column(COLUMN, [list(row.penalised(length_penalty)) for row in rows])
    return data.add_column(TEXTS, [list(row.completions) for row in rows])


def _row(record: dict[str, Any]) -> References:
    values = {name: record[name] for name in ("prompt", "completions", "rewards", "lengths")}
    return References(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
