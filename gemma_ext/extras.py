"""Optional packages: looked for before the work starts, not in the middle of it."""

from __future__ import annotations

from importlib.util import find_spec


def require(what: str, extra: str, *packages: str) -> None:
    """Raises an ImportError with the command that installs what is missing, if anything is.

    Args:
        what: the part of gemma_ext that needs the packages.
        extra: the extra of gemma_ext that has them.
        packages: import names.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'gemma_ext[{extra}]'")
