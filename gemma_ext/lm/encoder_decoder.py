"""Scoring by an encoder and a decoder: every distinct prompt is encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gemma_ext.lm.causal import padded
from gemma_ext.lm.head import Scored, read
from gemma_ext.lm.plan import Mark, Row, buckets, check_targets
from gemma_ext.lm.protocol import Score
from gemma_ext.lm.text import Job


class EncoderDecoder:
    """Scores jobs whose context the encoder reads and whose targets the decoder predicts.

    Args:
        forward: of the model.
        window: inputs that either half takes; a longer context loses its start.
        batch_tokens: padded inputs of a batch.
        device: of the inputs.

    Raises:
        ValueError: the model does not say with which token its decoder starts.
    """

    def __init__(
        self, forward: Scored, window: int, batch_tokens: int, device: torch.device
    ) -> None:
        self.forward, self.window = forward, window
        self.batch_tokens, self.device = batch_tokens, device
        self.start = start_token(forward.model)

    def scores(
        self, jobs: Sequence[Job], places: Sequence[int]
    ) -> Iterator[list[tuple[int, Score]]]:
        """Scores of the jobs at `places`, batch by batch."""
        owned: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            check_targets(jobs[place].targets, self.window)
            owned.setdefault(tuple(jobs[place].context[-self.window :]), []).append(place)
        contexts = list(owned)
        for group in buckets([len(context) for context in contexts], self.batch_tokens):
            chosen = [contexts[place] for place in group]
            yield from self._decode(jobs, chosen, [owned[context] for context in chosen])

    def _decode(
        self, jobs: Sequence[Job], contexts: list[tuple[int, ...]], owned: list[list[int]]
    ) -> Iterator[list[tuple[int, Score]]]:
        ids, real = padded([list(c) for c in contexts], left=False, device=self.device)
        states = self.forward.model.get_encoder()(input_ids=ids, attention_mask=real)
        pairs = [(owner, place) for owner, some in enumerate(owned) for place in some]
        lengths = [ids.shape[1] + len(jobs[place].targets) for _, place in pairs]
        for group in buckets(lengths, self.batch_tokens):
            rows = [self._row(jobs, pairs[place][1]) for place in group]
            owners = torch.tensor([pairs[place][0] for place in group], device=self.device)
            inputs, _ = padded([row.inputs for row in rows], left=False, device=self.device)
            output = self.forward(
                encoder_outputs=type(states)(last_hidden_state=states.last_hidden_state[owners]),
                attention_mask=real[owners],
                decoder_input_ids=inputs,
                use_cache=False,
            )
            yield read(output.logits, rows)

    def _row(self, jobs: Sequence[Job], place: int) -> Row:
        targets = jobs[place].targets
        return Row([self.start, *targets[:-1]], [Mark(place, 0, targets)])


def start_token(model: torch.nn.Module) -> int:
    """The token before everything that the decoder of `model` writes."""
    configs = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            token = getattr(config, name, None)
            if token is not None:
                return token
    raise ValueError(f"expected {type(model).__name__} to have a decoder_start_token_id, got None")
