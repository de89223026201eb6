"""The program in this process, which has imported it already."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from t2.cli.main import app
from t2.core.errors import T2Error


class Here:
    """Runs the program.

    Attributes:
        code: the exit code of the last run.
        errors: what it wrote to standard error.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.code = 0
        self.errors = ""

    def __call__(self, *arguments: object) -> str:
        """What it prints."""
        self.capsys.readouterr()
        self.code = int(app([str(argument) for argument in arguments], standalone_mode=False) or 0)
        told = self.capsys.readouterr()
        self.errors = told.err
        return told.out

    def fields(self, *arguments: object) -> dict[str, str]:
        """The names and values that it prints."""
        lines = [line for line in self(*arguments).splitlines() if "  " in line]
        return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)

    def table(self, *arguments: object) -> list[dict[str, str]]:
        """The rows that it prints, by column."""
        header, *rows = [re.split(r"\s{2,}", line) for line in self(*arguments).splitlines()]
        return [dict(zip(header, row, strict=True)) for row in rows]

    def json(self, *arguments: object) -> Any:
        """What it prints with ``--json``."""
        return json.loads(self(*arguments, "--json"))

    def refused(self, *arguments: object) -> str:
        """The one line of an error."""
        with pytest.raises(T2Error) as caught:
            self(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)
