"""`gemma-ext`: one sub-command per line of COMMANDS.

Only the module of the command asked for is imported, unless help for all of them is.
"""

from __future__ import annotations

import sys
from importlib import import_module

from gemma_ext._version import __version__

COMMANDS = {
    "demo": "gemma_ext.demo.command:main",
    "evolve": "gemma_ext.papers.genome.command:main",
    "info": "gemma_ext.info:main",
    "merge": "gemma_ext.souping.recipes.command:main",
    "ppo": "gemma_ext.ppo.command:main",
    "recursive": "gemma_ext.papers.recursive.command:app",
    "sae": "gemma_ext.sae.command:app",
    "salsa": "gemma_ext.papers.salsa.command:app",
    "serve": "gemma_ext.serve.command:main",
}


def main() -> None:
    """Entry point of the console script."""
    try:
        import typer
    except ImportError:
        raise SystemExit("gemma-ext needs typer: pip install 'gemma_ext[demo]'") from None

    class Alphabetical(typer.core.TyperGroup):
        def list_commands(self, context: typer.Context) -> list[str]:
            return sorted(self.commands)

    app = typer.Typer(
        cls=Alphabetical,
        help="Kernels and methods for Gemma-class models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    version = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    )

    @app.callback()  # keeps a single command a sub-command
    def root(version: bool = version) -> None: ...

    asked = sys.argv[1] if len(sys.argv) > 1 else None
    for name in [asked] if asked in COMMANDS else () if asked == "--version" else COMMANDS:
        module, function = COMMANDS[name].split(":")
        target = getattr(import_module(module), function)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name)
        else:
            # a command whose further flags are its own business says so
            settings = getattr(target, "context_settings", None)
            app.command(name, context_settings=settings)(target)
    app(prog_name="gemma-ext")


def _version(asked: bool) -> None:
    if asked:
        print(f"gemma_ext {__version__}")
        raise SystemExit(0)


if __name__ == "__main__":
    main()
