"""What is shown of work that takes long: a bar of requests, or one line for a whole search."""

from __future__ import annotations

import sys
import time
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self, TypeAlias

from tqdm import tqdm

EVERY = (0.2, 60.0)
"""Seconds between two looks of a search's line: on a terminal, and in a log, where each of them stays."""

_BAR = "{desc}: {n_fmt}/{total_fmt} mixtures |{bar:20}| {elapsed}, {remaining} left{postfix}"
_LINE = "{desc}: {n_fmt}/{total_fmt} mixtures, {elapsed}, {remaining} left{postfix}"

_search: ContextVar[SearchBar | None] = ContextVar("search", default=None)


def request_bar(text: str | None, total: int, unit: str = "request") -> Bar:
    """A bar for requests that take longer than a second; inside a search, whose line tells of them, none.

    Args:
        text: what stands before the bar; None shows none.
        total: number of requests.
        unit: what they are.
    """
    search = _search.get()
    if text is not None and search is not None:
        return _Told(search, total)
    hidden = True if text is None else None  # None: where there is no terminal
    return tqdm(total=total, desc=text, unit=unit, disable=hidden, delay=1, leave=False)


class SearchBar:
    """One line for a search: mixtures done of all, time left, and facts such as the generation and the best score.

    On a terminal it is written over and over; elsewhere a line is added once a minute, and one at the end. While it is
    open no other bar is shown by the same thread.

    Args:
        task: what is searched for.
        show: whether there is anything to be seen.
    """

    def __init__(self, task: str, show: bool = True) -> None:
        self._task = self._text = task
        self._show = show
        self._facts: dict[str, str] = {}
        self._done = self._total = 0
        self._began = self._looked = time.monotonic()
        self._token: Token[SearchBar | None] | None = None
        self._bar: tqdm[Any] | None = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(desc=task, total=0, bar_format=_BAR, smoothing=0, dynamic_ncols=True)

    def __enter__(self) -> Self:
        self._token = _search.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _search.reset(self._token)
        if kind is None:
            self._facts.pop("answers", None)
            self._total = self._done
            self._look()
        if self._bar is not None:
            self._bar.close()

    def begin(self, stage: str, total: int) -> None:
        """Begin to count, and the clock with it.

        Args:
            stage: what is done.
            total: mixtures at most.
        """
        self._text = f"{self._task}: {stage}"
        self._done, self._total = 0, total
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(self._text, refresh=False)
            self._bar.reset(total)

    def limit(self, more: int | None) -> None:
        """At most so many mixtures are to come; None is no limit."""
        if more is not None:
            self._total = min(self._total, self._done + more)

    def tell(self, **facts: str) -> None:
        """Set what stands behind the numbers."""
        self._facts |= facts
        self.update(0)

    def update(self, mixtures: int) -> None:
        """So many more mixtures are done."""
        self._done += mixtures
        self._total = max(self._total, self._done)
        if time.monotonic() - self._looked >= EVERY[self._bar is None]:
            self._look()

    def answered(self, done: int, total: int) -> None:
        """So many answers of the mixtures that are asked now are there."""
        self._facts.pop("answers", None)
        if done < total:
            self._facts["answers"] = f"{done}/{total}"
        self.update(0)

    def _look(self) -> None:
        self._looked = time.monotonic()
        facts = ", ".join(f"{name} {fact}" for name, fact in self._facts.items())
        if self._bar is not None:
            self._bar.n, self._bar.total = self._done, self._total
            self._bar.set_postfix_str(facts)
        elif self._show:
            line = tqdm.format_meter(
                self._done,
                self._total,
                self._looked - self._began,
                prefix=self._text,
                bar_format=_LINE,
                postfix=facts,
            )
            tqdm.write(f"t2: {line}", file=sys.stderr)


class _Told:
    """Requests inside a search."""

    def __init__(self, search: SearchBar, total: int) -> None:
        self._search = search
        self._done, self._total = 0, total

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._search.answered(self._total, self._total)

    def update(self, n: int) -> None:
        """So many more are done."""
        self._done += n
        self._search.answered(self._done, self._total)


Bar: TypeAlias = "tqdm[Any] | _Told"
"""A context that is told by ``update`` of what is done."""
