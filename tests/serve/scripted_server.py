"""A server process over a scripted engine: `python scripted_server.py PORT SECONDS_PER_STEP`."""

import sys

from live_server import LIMITS, NAME, TEMPLATE

from gemma_ext.pocket import load_text
from gemma_ext.serve.async_engine import AsyncEngine
from gemma_ext.serve.http.app import build_app
from gemma_ext.serve.http.served import Served
from gemma_ext.serve.http.server import Server
from gemma_ext.serve.http.settings import Settings
from gemma_ext.serve.scripted import ScriptedEngine

if __name__ == "__main__":
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    engine = AsyncEngine(lambda: ScriptedEngine(LIMITS, seconds=seconds, running=32), most_open=512)
    served = Served(NAME, load_text("nano").tokenizer, (1,), chat_template=TEMPLATE)
    app = build_app(engine, served, Settings(drain_seconds=10))
    Server(app, port=port, log_level="warning").run()
