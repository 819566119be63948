"""The trained pocket for any test: made once per machine, in the user's cache."""

import pytest


@pytest.fixture(scope="session")
def pocket_nano():
    """`gemma_ext.pocket.load("nano")`; the model is shared, so copy it before changing it."""
    from gemma_ext.pocket import load

    return load("nano", show_progress=False)
