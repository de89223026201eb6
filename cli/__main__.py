"""``python -m t2.cli``."""

from __future__ import annotations

from t2.cli.main import main

main()
