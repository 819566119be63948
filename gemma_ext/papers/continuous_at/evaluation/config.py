"""Settings and results of GCG, by nanoGCG's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ProbeSamplingConfig:
    """Probe sampling (arXiv 2403.01251): a small model scores all candidates, the model few.

    Attributes:
        draft_model, draft_tokenizer: the small model.
        r: divides the number of candidates that the model scores beside the probe set.
        sampling_factor: the probe set is one candidate in as many.
    """

    draft_model: PreTrainedModel
    draft_tokenizer: PreTrainedTokenizerBase
    r: int = 8
    sampling_factor: int = 16


@dataclass
class GCGConfig:
    """Names and defaults of nanoGCG 0.3.0; the last field is new.

    Attributes:
        num_steps: of the search.
        optim_str_init: text that the search starts at, or one for each place of the buffer, all of
            one length in tokens.
        search_width: candidates drawn in a step.
        batch_size: candidates run at once; None chooses.
        topk: tokens by gradient that a place draws from.
        n_replace: places changed in a candidate.
        buffer_size: best strings that are kept; 0 goes on from the best candidate even if it is
            worse.
        use_mellowmax: mellowmax of the target's negated logits in place of cross-entropy.
        mellowmax_alpha: of it.
        early_stop: end as soon as every token of the target is the likeliest for a candidate.
        use_prefix_cache: False runs every candidate with all that stands before it.
        allow_non_ascii: also draw tokens that are not printable ASCII.
        filter_ids: leave out candidates whose text has other ids.
        add_space_before_target: put a space before the target.
        seed: of the draws; None takes one from torch's own generator, which a seed leaves alone.
        verbosity: "INFO" or "DEBUG" draw a bar.
        probe_sampling_config: None scores every candidate by the model.
        filter_prompt: leave out candidates whose ids change where they stand in the prompt.

    Raises:
        ValueError: a number that does not fit.
    """

    num_steps: int = 250
    optim_str_init: str | list[str] = "x x x x x x x x x x x x x x x x x x x x"
    search_width: int = 512
    batch_size: int | None = None
    topk: int = 256
    n_replace: int = 1
    buffer_size: int = 0
    use_mellowmax: bool = False
    mellowmax_alpha: float = 1.0
    early_stop: bool = False
    use_prefix_cache: bool = True
    allow_non_ascii: bool = False
    filter_ids: bool = True
    add_space_before_target: bool = False
    seed: int | None = None
    verbosity: str = "INFO"
    probe_sampling_config: ProbeSamplingConfig | None = None
    filter_prompt: bool = False

    def __post_init__(self) -> None:
        least = {"num_steps": 0, "search_width": 1, "topk": 1, "n_replace": 1, "buffer_size": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"expected {name} to be at least {value}, got {getattr(self, name)}"
                )


@dataclass
class GCGResult:
    """What a search found.

    Attributes:
        best_loss: the lowest of `losses`.
        best_string: the one of `strings` beside it.
        losses: lowest of the candidates of each step.
        strings: that each step went on from.
    """

    best_loss: float
    best_string: str
    losses: list[float]
    strings: list[str]
