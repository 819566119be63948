"""JSON over HTTP that waits its turn, tries again where that helps, and counts what it used."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

_TRANSIENT = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_LONGEST_WAIT = 60.0  # seconds; a server may ask for more


class EndpointError(RuntimeError):
    """An endpoint refused a request, or could not be reached."""


@dataclass(frozen=True)
class Usage:
    """What an endpoint has been asked for and has answered.

    Attributes:
        requests: that were answered; retries: attempts beyond the first of each.
        input_tokens, output_tokens: as the endpoint counts them.
        cost: in the currency of the prices.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address it was given for, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Posts to one endpoint, from any number of threads.

    Args:
        url: up to and including the version, as "https://api.openai.com/v1".
        key: sent as bearer token; None for none.
        requests_per_minute: None for no limit.
        retries: attempts beyond the first, after a transient status or a lost connection; the wait
            doubles from `backoff` seconds, with a random part, unless the server names one.
        timeout: seconds without an answer.
        prices: of a million input and a million output tokens.

    Raises:
        ValueError: a url of another kind.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        requests_per_minute: float | None,
        retries: int,
        backoff: float,
        timeout: float,
        prices: tuple[float, float],
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"expected url to begin with http:// or https://, got {url!r}")
        self.url, self._key = url.rstrip("/"), key
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._retries, self._backoff, self._timeout = retries, backoff, timeout
        self._prices = prices
        self._lock = threading.Lock()
        self._next = 0.0
        self.usage = Usage()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EndpointError: a status that will not change, the last of the retries failed, or the
                answer is no JSON object.
        """
        for attempt in range(self._retries + 1):
            self._wait_for_turn()
            try:
                answer = self._send(path, body)
            except urllib.error.HTTPError as error:
                wait, reason = error.headers.get("Retry-After"), _reason(error)
                if error.code not in _TRANSIENT:
                    raise EndpointError(f"{self.url}{path}: {reason}") from None
            except (OSError, HTTPException) as error:
                wait, reason = None, str(getattr(error, "reason", error) or type(error).__name__)
            else:
                self._count(answer, attempt)
                return answer
            if attempt < self._retries:
                time.sleep(_pause(wait, self._backoff * 2**attempt))
        tries = self._retries + 1
        raise EndpointError(f"{self.url}{path}: no answer in {tries} attempts, last: {reason}")

    def _send(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers, method="POST"
        )
        with self._opener.open(request, timeout=self._timeout) as response:
            text = response.read()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EndpointError(f"{self.url}{path}: expected a JSON object, got {text[:80]!r}")
        return answer

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)

    def _count(self, answer: Mapping[str, Any], retries: int) -> None:
        used = answer.get("usage") or {}
        read, written = used.get("prompt_tokens") or 0, used.get("completion_tokens") or 0
        cost = (read * self._prices[0] + written * self._prices[1]) / 1e6
        with self._lock:
            old = self.usage
            self.usage = Usage(
                old.requests + 1,
                old.retries + retries,
                old.input_tokens + read,
                old.output_tokens + written,
                old.cost + cost,
            )


def _reason(error: urllib.error.HTTPError) -> str:
    """Status and message of a refusal."""
    text = error.read().decode("utf-8", "replace")
    try:
        told = json.loads(text)["error"]
        text = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError):
        pass
    return f"{error.code} {error.reason}: {str(text)[:300]}"


def _pause(asked: str | None, backoff: float) -> float:
    """Seconds before the next attempt."""
    try:
        wait = float(asked)
    except (TypeError, ValueError):  # none, or a date
        return min(backoff, _LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return max(0.0, wait)
