"""Which experts take part when none are named: of this base, one per domain, chosen by alias and validation score."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from t2.adapters.expert import Expert, distinct, load_expert, of_file
from t2.core.errors import ArgumentError, ExpertFileError, StorageError, T2Error, UnavailableError
from t2.core.manifest import BaseModelRef, Kind
from t2.core.references import PRODUCTION
from t2.core.settings import experts_dir, is_registry_configured, registry_url
from t2.harness.catalogue import own_experts, shipped_experts
from t2.harness.registry import every, is_server, read_version, registry
from t2.harness.runs import read_run
from t2.registry.client.base import RegistryClient
from t2.registry.client.cache import ExpertCache
from t2.registry.schemas import MAX_PAGE, VALIDATION_SCORE, Version, VersionQuery

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An expert that might take part by default.

    Attributes:
        name: in the registry, or in ``T2_EXPERTS_DIR``.
        version: its number in the registry; 0 for a file.
        digest: of its file.
        domain: what it is for.
        production: whether the alias ``production`` points to it.
        score: its validation score, where there is one.
        load: reads it.
    """

    name: str
    version: int
    digest: str
    domain: str | None
    production: bool
    score: float | None
    load: Callable[[], Expert]

    @property
    def rank(self) -> tuple[bool, bool, float, str, int]:
        """Its place among those of its domain; the smallest is chosen."""
        return (
            not self.production,
            self.score is None,
            -(self.score if self.score is not None else 0.0),
            self.name,
            -self.version,
        )


def default_experts(base: BaseModelRef, where: str | None = None) -> list[Expert]:
    """The experts of kind ``expert`` for a base, one per domain, ordered by name.

    In a domain goes first what the alias ``production`` points to, then the better ``validation.score``, then the name
    and the newer version. Experts in ``T2_EXPERTS_DIR`` that are not in the registry stand beside its own with the
    score of their training. One without a domain is alone in its own.

    Args:
        base: the base model.
        where: the registry; None is the one in use.

    Raises:
        ArgumentError: there are none.
        UnavailableError: the registry is configured and cannot be reached.
    """
    chosen = _choose(base, "expert", where, one=False)
    if not chosen:
        raise ArgumentError(
            f"no expert for {base.id} (fingerprint {base.fingerprint[:12]}) in the registry {where or registry_url()}, "
            f"in {experts_dir()} or among the demo experts; train one with t2 train, or name one with experts="
        )
    return distinct(sorted(chosen, key=lambda expert: (expert.name, expert.digest)))


def default_classifier(base: BaseModelRef, where: str | None = None) -> Expert | None:
    """The classifier for a base, by the order of :func:`default_experts`; None where there is none.

    Raises:
        UnavailableError: the registry is configured and cannot be reached.
    """
    return next(iter(_choose(base, "classifier", where, one=True)), None)


def _choose(base: BaseModelRef, kind: Kind, where: str | None, one: bool) -> list[Expert]:
    own = _own(own_experts(), base, kind)
    try:
        with registry(where) as client:
            kept = _kept(client, base, kind)
            chosen = _take(_merged(kept, own), one)
            if chosen or not is_server(where):
                return chosen
            return _take(_own(shipped_experts(), base, kind), one)
    except (StorageError, UnavailableError) as error:
        if where is not None or is_registry_configured():
            raise
        _log.warning("%s; going on with the experts in %s and those that come with t2", error, experts_dir())
    return _take(_merged(own, _own(shipped_experts(), base, kind)), one)


def _take(candidates: Sequence[Candidate], one: bool) -> list[Expert]:
    """The best of each domain, or of all; one whose file cannot be read is passed over."""
    domains: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda each: each.rank):
        domains.setdefault("" if one else candidate.domain or f"({candidate.name})", []).append(candidate)
    taken, said = [], []
    for among in domains.values():
        for candidate in among:
            try:
                expert = candidate.load()
            except ExpertFileError as error:
                _log.warning("experts: passed over: %s", error)
                continue
            reason = _reason(candidate, len(among), "" if one else f" for {candidate.domain or 'no domain'}")
            said.append(f"{expert.reference or candidate.name} ({candidate.digest[:12]}; {reason})")
            taken.append(replace(expert, reason=reason))
            break
    if said:
        tqdm.write(f"t2: taken by default: {', '.join(said)}", file=sys.stderr)
    return taken


def _reason(candidate: Candidate, among: int, domain: str) -> str:
    score = "no validation score" if candidate.score is None else f"validation score {candidate.score:.4g}"
    if candidate.production:
        why = f"alias {PRODUCTION}"
    elif among == 1:
        why = "the only one"
    elif candidate.score is None:
        why = "first by name"
    else:
        why = "best score"
    of = f" of {among}" if among > 1 else ""
    return f"{why}{of}{domain}, {score}"


def _kept(client: RegistryClient, base: BaseModelRef, kind: Kind) -> list[Candidate]:
    """The registry's versions for a base."""
    query = VersionQuery(fingerprint=base.fingerprint, kind=kind)
    found = every(lambda cursor: client.search_versions(query, cursor=cursor, limit=MAX_PAGE))
    return [_candidate(client, version) for version in found]


def _candidate(client: RegistryClient, version: Version) -> Candidate:
    def load() -> Expert:
        cache = ExpertCache()
        cache.confirm(client, version)
        file = read_version(cache.download(client, version.digest), version, client.location)
        return replace(of_file(file), reference=version.reference)

    return Candidate(
        name=version.name,
        version=version.version,
        digest=version.digest,
        domain=version.domain,
        production=PRODUCTION in version.aliases,
        score=version.metrics.get(VALIDATION_SCORE),
        load=load,
    )


def _own(files: Mapping[str, Path], base: BaseModelRef, kind: Kind) -> list[Candidate]:
    """Files for a base, with the scores of their trainings."""
    found = []
    for name, path in files.items():
        try:
            expert = load_expert(path)
        except ExpertFileError as error:
            if kind == "expert":  # told once
                _log.warning("experts: passed over: %s", error)
            continue
        if expert.manifest.kind != kind or expert.manifest.base.fingerprint != base.fingerprint:
            continue
        found.append(Candidate(name, 0, expert.digest, expert.domain, False, _score(path), partial(_itself, expert)))
    return found


def _itself(expert: Expert) -> Expert:
    return expert


def _score(path: Path) -> float | None:
    try:
        return read_run(path).score
    except T2Error as error:
        _log.warning("experts: without its score: %s", error)
        return None


def _merged(first: Iterable[Candidate], second: Sequence[Candidate]) -> list[Candidate]:
    """Candidates of two sources; of the same content that of the first stays, with the other's score if it has none."""
    scores = {one.digest: one.score for one in second}
    kept = [one if one.score is not None else replace(one, score=scores.get(one.digest)) for one in first]
    there = {one.digest for one in kept}
    return [*kept, *(one for one in second if one.digest not in there)]
