"""Views of a scorer: one that counts what it is asked, one that shows only some of the docs."""

from __future__ import annotations

from collections.abc import Sequence

from t2.adapters.expert import Z, z_digest
from t2.adapters.search import Meter
from t2.adapters.strategies.base import Score, Scorer


class Metered:
    """A scorer that asks for nothing twice and counts the rest.

    Args:
        scorer: what answers.
        meter: what counts; a mixture on d of the n docs spends d/n evaluations, less the docs it has answered before.
    """

    def __init__(self, scorer: Scorer, meter: Meter) -> None:
        self.docs = scorer.docs
        self.prompts = scorer.prompts
        self.higher_is_better = scorer.higher_is_better
        self._scorer = scorer
        self._meter = meter
        self._answered: dict[str, set[int]] = {}
        self._scores: dict[tuple[str, tuple[int, ...] | None], Score] = {}

    @property
    def bounds(self) -> tuple[float, float] | None:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.bounds

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        part = None if docs is None else tuple(docs)
        keys = [z_digest(z) for z in mixtures]
        new = {key: z for key, z in zip(keys, mixtures, strict=True) if (key, part) not in self._scores}
        if new:
            scores = self._scorer.evaluate(list(new.values()), part) if part else self._scorer.evaluate([*new.values()])
            self._scores.update(((key, part), score) for key, score in zip(new, scores, strict=True))
            for key in new:
                self._count(key, part)
        return [self._scores[key, part] for key in keys]

    def knows(self, z: Z | None) -> bool:
        """Whether a mixture has answered all docs, so that to ask for it again spends nothing."""
        return len(self._answered.get(z_digest(z), ())) == self.docs

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        """See :class:`t2.adapters.strategies.Scorer`."""
        positions = range(self.docs) if docs is None else docs
        for index, z in enumerate(mixtures):
            own = tuple(doc for doc, row in zip(positions, rows, strict=True) if row == index)
            if own:
                self._count(z_digest(z), own)
        return self._scorer.combine(mixtures, rows, docs)

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.tie_break(mixtures) if docs is None else self._scorer.tie_break(mixtures, docs)

    def _count(self, key: str, part: tuple[int, ...] | None) -> None:
        answered = self._answered.setdefault(key, set())
        before = len(answered)
        answered.update(range(self.docs) if part is None else part)
        self._meter.spend((len(answered) - before) / self.docs)


class Part:
    """A scorer over some of another one's docs, as if there were no others.

    Args:
        scorer: the scorer over all docs.
        docs: positions of the docs that are shown.
    """

    def __init__(self, scorer: Scorer, docs: Sequence[int]) -> None:
        self.docs = len(docs)
        self.prompts: Sequence[str] = [scorer.prompts[doc] for doc in docs]
        self.higher_is_better = scorer.higher_is_better
        self._scorer = scorer
        self._shown = list(docs)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.bounds

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.evaluate(mixtures, self._positions(docs))

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.combine(mixtures, rows, self._positions(docs))

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        return self._scorer.tie_break(mixtures, self._positions(docs))

    def _positions(self, docs: Sequence[int] | None) -> list[int]:
        return self._shown if docs is None else [self._shown[doc] for doc in docs]
