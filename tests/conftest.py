"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

try:  # the shapes in the models' signatures are checked wherever tests run them
    from jaxtyping import install_import_hook

    install_import_hook("fedrec.models", "beartype.beartype")
except ImportError:  # the device core alone is installed
    pass


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of research data sets beside the checkout, or skip."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no research data beside this checkout (../shared/data)")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Compute with one torch thread, so that results do not depend on the machine's load."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
