"""`gemma-ext serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from gemma_ext.extras import require

LOCAL = ("127.0.0.1", "localhost", "::1")
KEY = "GEMMA_EXT_API_KEY"
# attributes that a sentence may begin with: their options
OPTIONS = {
    "name": "exit",
    "weight": "exit_weights",
    "bias": "exit_weights",
    "decay": "exit_decay",
    "adapt": "exit_adapt",
    "ranks": "tensor_parallel",
    "most_open": "max_open",
    "most_body": "max_body",
    "most_tokens": "max_tokens",
    "request_seconds": "request_timeout",
    "drain_seconds": "drain",
    "api_keys": "api_key",
    "policy": "kv_policy",
}


def main(
    model: Annotated[
        str, typer.Argument(help="pocket, pocket:nano, a folder (recursive or not), or a hub id.")
    ] = "pocket",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float64, float32, bfloat16, float16; auto: float32 on a CPU.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on a CPU.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Tokens in a run of the block.")] = 16,
    requests: Annotated[
        int | None, typer.Option(min=1, help="That hold pages; twice the width by default.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and output together.")
    ] = None,
    pages: Annotated[int | None, typer.Option(min=1, help="Of 16 tokens, of the KV pool.")] = None,
    kv_memory: Annotated[
        float, typer.Option(help="Share of the free memory that the KV pool has at most.")
    ] = 0.5,
    kv_policy: Annotated[
        str | None,
        typer.Option(help="Keys and values of skipped loops; as the model was trained by default."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="k of first_then_shared and modulo; likewise.")
    ] = None,
    kv_pressure: Annotated[
        str, typer.Option(help="reserve, none, recompute, offload: when pages run out.")
    ] = "reserve",
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Keep and share pages of prompts.")
    ] = False,
    fill_on_finish: Annotated[
        bool, typer.Option("--fill-on-finish", help="Share outputs too, not only prompts.")
    ] = False,
    backlog: Annotated[
        int, typer.Option(min=1, help="Tokens of a request whose loops wait to be filled.")
    ] = 64,
    order: Annotated[str, typer.Option(help="Of ready tokens: fifo, deepest, uniform.")] = "fifo",
    mode: Annotated[
        str, typer.Option(help="cdb refills at every loop, csb at full passes.")
    ] = "cdb",
    min_coda_batch: Annotated[
        int, typer.Option(min=1, help="Tokens that wait for the head until it runs.")
    ] = 1,
    drafts: Annotated[
        int, typer.Option(min=0, help="Exits are drafts, so many ahead of their check; 0: final.")
    ] = 0,
    routing: Annotated[
        str, typer.Option(help="Who makes the next rows: host, device; auto: device on a card.")
    ] = "auto",
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Rows of prompts in a run of the block.")
    ] = 256,
    exit: Annotated[
        str, typer.Option(help="Exit test: none, max_prob, margin, entropy, gate, ...")
    ] = "none",
    exit_threshold: Annotated[
        float | None, typer.Option(help="Of requests that name none.")
    ] = None,
    exit_weights: Annotated[
        Path | None, typer.Option(help="Safetensors file of a learned exit test.")
    ] = None,
    exit_strict: Annotated[
        bool | None,
        typer.Option(
            "--exit-strict/--exit-at-threshold",
            help="Whether a score at the threshold stays; each test has its own way.",
        ),
    ] = None,
    exit_decay: Annotated[
        float, typer.Option(help="tau of CALM's falling threshold; 0 for a constant one.")
    ] = 0.0,
    exit_adapt: Annotated[
        float,
        typer.Option(help="zeta of FREE's adaptive threshold, with --drafts; 0 for none."),
    ] = 0.0,
    shortlist: Annotated[
        bool, typer.Option("--shortlist", help="8-bit codes of the head for greedy requests.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="File that gets a line of JSON for every step.")
    ] = None,
    api_key: Annotated[
        list[str], typer.Option(envvar=KEY, help="One has to be sent; repeatable.")
    ] = [],  # noqa: B006 (typer)
    max_open: Annotated[
        int, typer.Option(min=1, help="Requests at a time; others get a 429.")
    ] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one output, as a client may ask for.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 * 2**20,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that an answer may take.")
    ] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds for open requests after SIGTERM.")] = 30.0,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the tokenizer's template.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that share the model; on cards, one each.")
    ] = 1,
    replicas: Annotated[
        int, typer.Option(min=1, help="Engines behind Ray Serve; 1 needs no Ray.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; auto for the running one.")
    ] = None,
    gpus: Annotated[float, typer.Option(help="Cards of a replica.")] = 0.0,
    log_level: Annotated[str, typer.Option(help="Of the server.")] = "info",
) -> None:
    """Serve a model to OpenAI clients: /v1/completions, /v1/chat/completions, /metrics, /health.

    \b
    Example: gemma-ext serve out/gemma-2-2b-r64 --exit max_prob --exit-threshold 0.9
    """
    try:
        require(
            "gemma-ext serve", "serve", "fastapi", "uvicorn", "prometheus_client", "transformers"
        )
    except ImportError as error:
        raise SystemExit(str(error)) from None
    from gemma_ext.serve.http.server import Server
    from gemma_ext.serve.http.settings import Settings
    from gemma_ext.serve.launch import Launch
    from gemma_ext.serve.replicas import serve_replicas

    try:
        launch = Launch(
            model,
            name=name,
            device=device,
            dtype=dtype,
            engine={
                "width": width,
                "requests": requests,
                "max_model_len": max_model_len,
                "pages": pages,
                "kv_policy": kv_policy,
                "keep": keep,
                "kv_pressure": kv_pressure,
                "prefix_cache": prefix_cache,
                "fill_on_finish": fill_on_finish,
                "backlog": backlog,
                "order": order,
                "mode": mode,
                "min_coda_batch": min_coda_batch,
                "drafts": drafts,
                "routing": routing,
                "prefill_tokens": prefill_tokens,
            },
            kv_memory=kv_memory,
            exits={
                "name": exit,
                "threshold": exit_threshold,
                "strict": exit_strict,
                "decay": exit_decay,
                "adapt": exit_adapt,
            },
            exit_weights=str(exit_weights) if exit_weights else None,
            shortlist=shortlist,
            trace=str(trace) if trace else None,
            chat_template=_text(chat_template) if chat_template else None,
            settings=Settings(
                api_keys=tuple(api_key),
                most_body=max_body,
                most_tokens=max_tokens,
                request_seconds=request_timeout,
                drain_seconds=drain,
            ),
            most_open=max_open,
            threads=threads,
            ranks=tensor_parallel,
        )
        if trace and replicas > 1:
            raise ValueError(f"trace: expected one replica with it, got {replicas}")
        if replicas > 1 or ray is not None:
            launch.check()
            serve_replicas(launch, replicas, host=host, port=port, address=ray, gpus=gpus)
            return
        server = Server(launch.app(), host, port, log_level)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"gemma-ext serve: {_sentence(error)}") from None
    if host not in LOCAL and not api_key:
        typer.echo(
            f"gemma-ext serve: whoever reaches {host} may ask; {KEY} asks for a key", err=True
        )
    server.run()


def _text(template: Path) -> str:
    try:
        return template.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise ValueError(f"chat_template: expected a text file, got {template}: {why}") from None


def _sentence(error: Exception) -> str:
    """On one line, with the option in the place of the attribute that it sets."""
    told = " ".join(str(error).split())
    attribute, colon, rest = told.partition(": ")
    option = OPTIONS.get(attribute, attribute)
    if not colon or option == "model" or option not in signature(main).parameters:
        return told
    return f"--{option.replace('_', '-')}: {rest}"
