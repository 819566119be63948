"""A server in a thread, over a scripted engine and the tokenizer of the nano pocket."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import openai
import pytest
from fastapi import FastAPI

from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.http.app import build_app
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.http.server import Server
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.protocol import Engine, Limits
from gemma_ext.serve.scripted import ScriptedEngine

NAME = "scripted"
EOS = 1
LIMITS = Limits(vocabulary=2048, loops=2, max_model_len=256)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}[{{ m.role }}] {{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@dataclass
class Live:
    """A running server; `engine` is what it asks, `made` the engine behind that."""

    server: Server
    engine: AsyncEngine
    made: list[Engine]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 30.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until nothing is held anywhere: in the server, in the engine, in its KV pool."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats
            idle = stats.waiting == stats.running == 0 and stats.pages == stats.free_pages
            if idle and self.engine.open == 0 and not self.made[0].has_work():
                return
            time.sleep(0.01)
        raise AssertionError(f"still held: {self.engine.open} open, {self.engine.stats}")


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[Server]:
    """The app behind a free port, in a thread."""
    server = Server(app, port=0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def live(
    tokenizer, make=None, *, settings: Settings | None = None, stop_ids=(EOS,), **engine_options
) -> Iterator[Live]:
    made: list[Engine] = []

    def keep() -> Engine:
        made.append(make() if make else ScriptedEngine(LIMITS))
        return made[0]

    engine = AsyncEngine(keep, **engine_options)
    served = Served(NAME, tokenizer, stop_ids, chat_template=TEMPLATE)
    with running(build_app(engine, served, settings)) as server:
        yield Live(server, engine, made)


@pytest.fixture(scope="session")
def nano_tokenizer():
    from gemma_ext.pocket import load_text

    return load_text("nano").tokenizer
