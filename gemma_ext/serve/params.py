"""How the tokens of a request are drawn: values, their bounds, and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

MOST_LOGPROBS = 20  # top tokens that can be asked for; as of the OpenAI API
MOST_SEED = 2**63
MOST_COUNT = 2**31 - 1  # of what the scheduler and the kernels count in 32 bits
MOST_IDS = 1024  # of logit_bias and stop_ids; each is looked at for every token drawn
GREEDY = 1e-6  # temperatures below it are 0: their inverse leaves no digit of a logit

# name: least and largest value, both legal
_INTEGERS = {
    "max_tokens": (0, MOST_COUNT),
    "min_tokens": (0, MOST_COUNT),
    "top_k": (0, MOST_COUNT),
    "seed": (-MOST_SEED, MOST_SEED - 1),
    "logprobs": (0, MOST_LOGPROBS),
    "min_loops": (1, MOST_COUNT),
    "max_loops": (1, MOST_COUNT),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "exit_threshold": (-1e30, 1e30),  # finite in float32
}
_OPTIONAL = ("logprobs", "max_loops", "exit_threshold")


def check_value(
    name: str, value: object, kind: type, least: float, most: float, optional: bool = False
) -> None:
    if value is None and optional:
        return
    what = "an integer" if kind is Integral else "a number"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if not least <= value <= most:  # NaN too
        low = value < least and most == MOST_COUNT
        span = f"at least {least}" if low else f"{least} to {most}"
        raise ValueError(f"{name}: expected {what} of {span}, got {value}")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    A draw is a function of (seed, choice of the request, position) and of the logits, so that no
    schedule changes it. Order: logit bias, repetition, presence and frequency penalty,
    temperature, top-k, top-p, min-p.

    Attributes:
        max_tokens: tokens to draw at most; 0 only scores the prompt.
        min_tokens: stop ids are not drawn before this many tokens.
        temperature: 0 takes the likeliest token, the lowest id of equal ones; below 1e-6 it is
            made 0.
        top_k: draw from the k likeliest; 0 for all.
        top_p: draw from the likeliest whose probabilities reach p, in (0, 1].
        min_p: draw from those with at least min_p times the probability of the likeliest.
        repetition_penalty: above 0; divides positive and multiplies negative logits of tokens in
            prompt or output.
        presence_penalty, frequency_penalty: in [-2, 2]; subtracted from the logits of drawn
            tokens, once and per occurrence.
        logit_bias: (token, added to its logit) pairs, each token once, 1024 at most; a mapping is
            taken too.
        seed: any signed 64-bit integer.
        logprobs: None for none; n for the log-probability of each drawn token and of the n
            likeliest ones, under the model's own distribution: soft-capped logits, before bias,
            penalties and temperature.
        tempered: those log-probabilities at `temperature` instead, as the gradient of a policy
            needs them; at temperature 0 the model's own.
        stop_ids: 1024 tokens at most that end the output; the last event has the one that did.
        exit_threshold: of the engine's exit test; None for the engine's own.
        min_loops, max_loops: bounds of the loop after which a token is read; None for all loops.

    Raises:
        TypeError, ValueError: a value that does not fit; one sentence that begins with its name.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    tempered: bool = False
    stop_ids: tuple[int, ...] = ()
    exit_threshold: float | None = None
    min_loops: int = 1
    max_loops: int | None = None

    def __post_init__(self) -> None:
        for names, kind in ((_INTEGERS, Integral), (_NUMBERS, Real)):
            for name, (least, most) in names.items():
                check_value(name, getattr(self, name), kind, least, most, name in _OPTIONAL)
        if self.temperature < GREEDY:
            object.__setattr__(self, "temperature", 0.0)
        if not isinstance(self.tempered, bool):
            raise TypeError(f"tempered: expected True or False, got {self.tempered!r}")
        for name in ("logit_bias", "stop_ids"):
            if len(getattr(self, name)) > MOST_IDS:
                raise ValueError(
                    f"{name}: expected at most {MOST_IDS} tokens, got {len(getattr(self, name))}"
                )
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.max_loops is not None and self.max_loops < self.min_loops:
            raise ValueError(
                f"max_loops: expected at least min_loops {self.min_loops}, got {self.max_loops}"
            )
        bias = self.logit_bias
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        object.__setattr__(self, "logit_bias", tuple((token, value) for token, value in pairs))
        for token, value in self.logit_bias:
            check_value("logit_bias", token, Integral, 0, MOST_COUNT)
            check_value("logit_bias", value, Real, -100.0, 100.0)
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError(f"logit_bias: expected every token once, got {self.logit_bias}")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for token in self.stop_ids:
            check_value("stop_ids", token, Integral, 0, MOST_COUNT)

    @property
    def divisor(self) -> float:
        """Of the logits whose log-probabilities are told."""
        return self.temperature if self.tempered and self.temperature > 0 else 1.0
