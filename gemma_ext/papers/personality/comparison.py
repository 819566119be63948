"""The whole study: every trait in context, by an adapter, by a direction as it is and purified.

Layer and strength of a direction are those of the most aligned trial whose texts are clean, on
questions of their own; the strengths of a layer reach from minus to plus half the mean length of
its states. Pieces are kept as they are finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.lm import HuggingFaceModel, Prompt, Sampling
from gemma_ext.ops.sae import Steering
from gemma_ext.papers.personality.calibration import STRENGTHS, Trial, best, best_layer, grid
from gemma_ext.papers.personality.contrast import Pair
from gemma_ext.papers.personality.directions import contrasted, without
from gemma_ext.papers.personality.manipulations import (
    AdapterRecipe,
    Manipulation,
    adapted,
    in_context,
    steered,
    train_adapter,
)
from gemma_ext.papers.personality.states import Ask, chat, last_states, trait_directions
from gemma_ext.papers.personality.study import (
    SAMPLING,
    Answers,
    Benchmark,
    Judge,
    answers,
    strength_trials,
)
from gemma_ext.report import Kept

PURIFIED = ("subspace", "contrast")
REACH = 0.5  # of the length of a state, which then turns by 27 degrees


@dataclass(frozen=True)
class Chosen:
    """Where and how strongly a trait is steered."""

    layer: int
    direction: Tensor
    strength: float


@dataclass(frozen=True)
class Comparison:
    """One run of the study.

    Attributes:
        lm: the model.
        pairs: of each trait, at least two of each.
        judge: of all texts.
        calibration, questions: two sets of questions.
        kept: finished pieces.
        adapters: folder.
        layers: to steer in.
        ask: a question as the model is asked it.
        sampling, samples: of the answers to a question.
        strengths: of the grid of a layer.
        benchmarks: run under every manipulation.
        recipe: of the adapters.
        site: that is steered.
    """

    lm: HuggingFaceModel
    pairs: Mapping[str, Sequence[Pair]]
    judge: Judge
    calibration: Sequence[str]
    questions: Sequence[str]
    kept: Kept
    adapters: Path
    layers: Sequence[int]
    ask: Ask = chat
    sampling: Sampling = SAMPLING
    samples: int = 1
    strengths: int = STRENGTHS
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    recipe: AdapterRecipe = field(default_factory=AdapterRecipe)
    site: str = "resid_mid"

    def run(self) -> tuple[dict[str, dict[int, list[Trial]]], dict[str, Chosen], list[Answers]]:
        """(trials by trait and layer, what was chosen of them, answers of all manipulations)."""
        directions = {
            trait: trait_directions(self.lm, some, self.layers, ask=self.ask, site=self.site)
            for trait, some in self.pairs.items()
        }
        limits = {layer: REACH * length for layer, length in self._lengths().items()}
        trials = {
            trait: {
                layer: self._trials("steering", trait, layer, v, limits[layer])
                for layer, v in of_layers.items()
            }
            for trait, of_layers in directions.items()
        }
        chosen = {}
        for trait, of_layers in trials.items():
            layer, trial = best_layer(of_layers)
            chosen[trait] = Chosen(layer, directions[trait][layer], trial.strength)
        ways = [*self._taught(), *self._steered(chosen, directions, limits)]
        found = [self._answers(way) for way in ways]
        (plain,) = [each for each in found if (each.method, each.trait) == ("steering", None)]
        found += [replace(plain, method=f"steering, {how}") for how in PURIFIED]
        return trials, chosen, found

    def _taught(self) -> list[Manipulation]:
        """In context and by adapters, each with its baseline."""
        ways = [in_context(self.pairs, trait, ask=self.ask) for trait in (None, *self.pairs)]
        ways.append(adapted(self.lm, None, None, ask=self.ask))
        for trait, some in self.pairs.items():
            folder = self.adapters / trait
            train_adapter(self.lm, some, folder, self.recipe, ask=self.ask)
            ways.append(adapted(self.lm, folder, trait, ask=self.ask))
        return ways

    def _steered(
        self,
        chosen: Mapping[str, Chosen],
        directions: Mapping[str, Mapping[int, Tensor]],
        limits: Mapping[int, float],
    ) -> list[Manipulation]:
        first = next(iter(chosen.values()))
        ways = [self._steering(None, first)]
        for trait, place in chosen.items():
            ways.append(self._steering(trait, place))
            at = {name: of_layers[place.layer] for name, of_layers in directions.items()}
            for how in PURIFIED:
                pure = self._purified(how, trait, place.layer, at)
                method = f"steering, {how}"
                some = self._trials(method, trait, place.layer, pure, limits[place.layer])
                anew = Chosen(place.layer, pure, best(some).strength)
                ways.append(replace(self._steering(trait, anew), method=method))
        return ways

    def _steering(self, trait: str | None, place: Chosen) -> Manipulation:
        options: dict[str, Any] = {"ask": self.ask, "site": self.site}
        return steered(self.lm, place.layer, place.direction, place.strength, trait, **options)

    def _high(self, trait: str) -> list[tuple[Prompt, str]]:
        """Questions and high answers that the judge takes for high ones; all if it takes none."""
        pairs, label = self.pairs[trait], self.judge.label[trait]
        labels = self.judge.traits([pair.high_trait_response for pair in pairs])
        right = [pair for pair, found in zip(pairs, labels, strict=True) if found == label]
        return [(self.ask(pair.question), pair.high_trait_response) for pair in right or pairs]

    def _states(self, trait: str, layer: int) -> Tensor:
        parts = last_states(self.lm, self._high(trait), [layer], site=self.site)
        return torch.cat([part[layer] for part in parts])

    def _lengths(self) -> dict[int, float]:
        """Mean length of each layer's states."""
        first = next(iter(self.pairs))
        parts = list(last_states(self.lm, self._high(first), self.layers, site=self.site))
        return {
            layer: float(torch.cat([part[layer] for part in parts]).norm(dim=-1).mean())
            for layer in self.layers
        }

    def _trials(
        self, method: str, trait: str, layer: int, direction: Tensor, limit: float
    ) -> list[Trial]:
        measure = strength_trials(
            self.lm,
            layer,
            Steering(direction[None], 1.0),
            self.calibration,
            self.judge,
            trait,
            ask=self.ask,
            site=self.site,
            sampling=self.sampling,
        )
        found = self.kept(
            f"trials: {method}, {trait}, layer {layer}",
            lambda: [asdict(t) for t in grid(measure, -limit, limit, self.strengths)],
        )
        return [Trial(**trial) for trial in found]

    def _purified(self, how: str, trait: str, layer: int, at: Mapping[str, Tensor]) -> Tensor:
        others = [other for other in at if other != trait]
        if how == "subspace":
            return without(at[trait], torch.stack([at[other] for other in others]))
        rest = torch.cat([self._states(other, layer) for other in others])
        return contrasted(at[trait], self._states(trait, layer), rest)

    def _answers(self, way: Manipulation) -> Answers:
        found = self.kept(
            f"answers: {way.method}, {way.trait or 'baseline'}",
            lambda: asdict(
                answers(
                    self.lm,
                    way,
                    self.questions,
                    self.judge,
                    samples=self.samples,
                    sampling=self.sampling,
                    benchmarks=self.benchmarks,
                )
            ),
        )
        return Answers(**found)
