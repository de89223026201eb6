"""The experts that come with t2; found without PyTorch."""

from __future__ import annotations

from pathlib import Path

PREFIX = "demo/"
"""Their names are ``demo/<name>``."""


def demo_dir() -> Path:
    """The folder of the experts that t2 ships."""
    return Path(__file__).parent / "demo"
