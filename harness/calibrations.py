"""What a dispatch was answered about held-out prompts, on disk: every run over the same base asks the same of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

from t2.core.digests import digest_of
from t2.core.errors import StorageError
from t2.core.files import atomic_write
from t2.core.settings import cache_dir

_FORMAT = 1

_log = logging.getLogger(__name__)


class Calibrations(MutableMapping[tuple[str, str], tuple[float, ...]]):
    """Answers by who was asked and a digest of the question's tokens; :meth:`update` writes them to the cache.

    A file that cannot be read counts as absent; one that cannot be written is reported, and the run goes on.

    Args:
        base: what tells models apart whose answers differ: fingerprint, dtype and engine.
    """

    def __init__(self, base: list[str]) -> None:
        self.path = cache_dir() / "calibrations" / f"{digest_of([_FORMAT, *base])}.json"
        self._answers = self._read()

    def __getitem__(self, key: tuple[str, str]) -> tuple[float, ...]:
        """The answer."""
        return self._answers[key]

    def __setitem__(self, key: tuple[str, str], value: tuple[float, ...]) -> None:
        """Take an answer, without writing it."""
        self._answers[key] = value

    def __delitem__(self, key: tuple[str, str]) -> None:
        """Forget an answer."""
        del self._answers[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The keys."""
        return iter(self._answers)

    def __len__(self) -> int:
        """Number of answers."""
        return len(self._answers)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take answers and write all of them, with those that another run has written meanwhile."""
        super().update(*args, **kwargs)
        self._answers = {**self._read(), **self._answers}
        text = json.dumps([[*key, *value] for key, value in sorted(self._answers.items())])
        try:
            atomic_write(self.path, text.encode())
        except StorageError as error:
            _log.warning("answers about held-out prompts are not kept: %s", error)

    def _read(self) -> dict[tuple[str, str], tuple[float, ...]]:
        try:
            rows = json.loads(self.path.read_bytes())
            return {(str(name), str(digest)): tuple(map(float, values)) for name, digest, *values in rows}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s cannot be read (%s); asking again", self.path, type(error).__name__)
            return {}
