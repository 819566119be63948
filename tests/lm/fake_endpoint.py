"""An OpenAI-compatible server on this machine, whose model counts words."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = re.compile(r"\s*\w+|\W")


def logprob(before: str, token: str) -> float:
    """Of a token after a text: the longer and the later, the less likely."""
    return -len(token) / 8 - len(before) / 64


class FakeEndpoint:
    """Answers until it is closed.

    Attributes:
        url: up to the version.
        seen: bodies of all requests that came, and their headers.
        busiest: most requests under way at a time.
        troubles: (status, headers, body) to answer with before anything else, in order; a status
            of 0 closes the connection.
        alter: changes every good answer.
        delay: seconds that a good answer takes.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict, dict]] = []
        self.times: list[float] = []
        self.troubles: list[tuple[int, dict[str, str], str]] = []
        self.alter: Callable[[dict], object] = lambda answer: answer
        self.delay, self.busiest, self._busy = 0.0, 0, 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.seen.append((handler.path, body, dict(handler.headers)))
            self.times.append(time.monotonic())
            trouble = self.troubles.pop(0) if self.troubles else None
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        if trouble is None:
            time.sleep(self.delay)
            made = _chat(body) if handler.path == "/v1/chat/completions" else _completion(body)
            trouble = (200, {}, json.dumps(self.alter(made)))
        with self._lock:
            self._busy -= 1
        status, headers, text = trouble
        if status == 0:
            handler.connection.close()
            return
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())


def written(prompt: str) -> str:
    """What the model writes after a prompt."""
    return f" {len(prompt)} letters. Then more"


def _cut(text: str, body: dict) -> tuple[str, str, int]:
    ends = [text.find(stop) for stop in body.get("stop", []) if stop in text]
    text = text[: min(ends, default=len(text))]
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    kept = TOKEN.findall(text)[:limit]
    return "".join(kept), "length" if "".join(kept) != text else "stop", len(kept)


def _chat(body: dict) -> dict:
    prompt = body["messages"][-1]["content"]
    text, reason, count = _cut(written(prompt), body)
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    if body.get("logprobs"):
        tops = [("Yes", -0.5), (" Yes", -2.0), ("No", -1.5), ("A", -4.0)][: body["top_logprobs"]]
        named = [{"token": token, "logprob": value} for token, value in tops]
        choice["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": named}]}
    return {"choices": [choice], "usage": _usage(prompt, count)}


def _completion(body: dict) -> dict:
    prompt = body["prompt"]
    text, reason, count = _cut(written(prompt), body)
    choice = {"text": text, "finish_reason": reason}
    if body.get("echo"):
        tokens = TOKEN.findall(prompt + text)
        places = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        values = [
            logprob((prompt + text)[:at], token) if at else None
            for at, token in zip(places, tokens, strict=True)
        ]
        tops = [
            {token: value, "other": -1.0} if value is not None else None
            for token, value in zip(tokens, values, strict=True)
        ]
        choice["text"] = prompt + text
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
    return {"choices": [choice], "usage": _usage(prompt, count)}


def _usage(prompt: str, count: int) -> dict:
    return {"prompt_tokens": len(TOKEN.findall(prompt)), "completion_tokens": count}
