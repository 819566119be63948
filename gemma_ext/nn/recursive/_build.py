"""A model of transformers around tensors that are there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def build(cls: type, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model in evaluation mode, whose Parameters have the dtypes of their tensors.

    A tensor under an older name than the Parameter's is cast to the first dtype that is there.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    with quiet():
        model, found = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=next(t.dtype for t in state.values() if t.is_floating_point()),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            what, key = problem.split("_")[0], sorted(map(str, found[problem]))[0]
            raise ValueError(
                f"weights: expected exactly those of {cls.__name__}, got {what} ones as {key}"
            )
    own = dict(model.named_parameters())
    for key, tensor in state.items():
        if key in own and own[key].dtype != tensor.dtype:
            own[key].data = tensor
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bar and the table that transformers shows when it loads."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
