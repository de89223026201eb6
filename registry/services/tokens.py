"""Access tokens: ``t2r_``, 256 random bits and a checksum; scanners find leaked ones, and a typing error is told.

Only the SHA-256 of a token is kept. That is safe because of the 256 bits: there is nothing to guess.
"""

from __future__ import annotations

import hmac
import re
import secrets
import zlib
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from t2.core.digests import sha256
from t2.core.errors import InvalidRequestError, NotFoundError, UnauthorizedError
from t2.registry.db import models
from t2.registry.names import MAX_NUMBER
from t2.registry.schemas import NewToken, Scope, TokenInfo
from t2.registry.services import audit
from t2.registry.services.actor import Actor

PREFIX = "t2r_"
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
MAX_NAME = 64
LAST_USE_SECONDS = 60.0
"""How old the recorded last use may be before a use is recorded anew: not every read should cost a write."""

_SECRET = re.compile(r"t2r_[0-9a-f]{64}[0-9a-f]{8}")


def create(session: Session, actor: Actor, name: str, scopes: Sequence[Scope], days: float | None) -> NewToken:
    """Make a token.

    Raises:
        InvalidRequestError: no or unknown scopes, an empty name, or a time that is not positive.
    """
    check_name(name)
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidRequestError(f"scopes: give one or more of {', '.join(SCOPES)}")
    if days is not None and not 0 < days <= 36500:
        raise InvalidRequestError(f"days: {days} is not between 0 and 36500")
    random = secrets.token_hex(32)
    secret = f"{PREFIX}{random}{_checksum(random)}"
    at = audit.now()
    row = models.Token(
        name=name,
        prefix=secret[: len(PREFIX) + 6],
        hash=sha256(secret.encode()),
        scopes=",".join(scope for scope in SCOPES if scope in scopes),
        created_at=at,
        expires_at=at + timedelta(days=days) if days is not None else None,
    )
    session.add(row)
    session.flush()
    audit.record(session, actor, "token.create", f"{row.id}:{name}", scopes=row.scopes)
    return NewToken(**_shape(row).model_dump(), secret=secret)


def check_name(name: str) -> None:
    """Check the name of a token.

    Raises:
        InvalidRequestError: it is empty, too long or not printable.
    """
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidRequestError(f"name: give the token a name of 1 to {MAX_NAME} printable characters")


def parse_scopes(text: str) -> tuple[Scope, ...]:
    """Parse the scopes in a token's row.

    Raises:
        InvalidRequestError: they are not in the form that :func:`create` writes.
    """
    scopes = tuple(scope for scope in SCOPES if scope in text.split(","))
    if not scopes or ",".join(scopes) != text:
        raise InvalidRequestError(f"scopes: give one or more of {', '.join(SCOPES)}")
    return scopes


def list_tokens(session: Session) -> list[TokenInfo]:
    """Oldest first."""
    return [_shape(row) for row in session.scalars(select(models.Token).order_by(models.Token.id))]


def revoke(session: Session, actor: Actor, id: int) -> TokenInfo:
    """Revoke a token, for ever; nothing more happens where it is revoked already."""
    row = session.get(models.Token, id, with_for_update=True) if 1 <= id <= MAX_NUMBER else None
    if row is None:
        raise NotFoundError(f"there is no token {id}")
    if row.revoked_at is None:
        row.revoked_at = audit.now()
        audit.record(session, actor, "token.revoke", f"{id}:{row.name}")
    return _shape(row)


def any_usable(session: Session) -> bool:
    """Whether there is a token that is neither revoked nor expired."""
    return any(_refusal(row) is None for row in session.scalars(select(models.Token)))


def authenticate(session: Session, secret: str) -> TokenInfo:
    """The token of a secret.

    The look-up is by the secret's SHA-256, whose bits an attacker does not control, and the comparison after it takes
    the same time wherever the two differ.

    Raises:
        UnauthorizedError: malformed, unknown, expired or revoked. The secret is not in the message.
    """
    if not _SECRET.fullmatch(secret) or not hmac.compare_digest(
        _checksum(secret[len(PREFIX) : len(PREFIX) + 64]).encode(), secret[len(PREFIX) + 64 :].encode()
    ):
        raise UnauthorizedError("the token is malformed; copy it again, it begins with t2r_ and has 76 characters")
    hashed = sha256(secret.encode())
    row = session.scalar(select(models.Token).where(models.Token.hash == hashed))
    if row is None or not hmac.compare_digest(row.hash.encode(), hashed.encode()):
        raise UnauthorizedError("the token is unknown; ask for a new one: t2 registry token create")
    refusal = _refusal(row)
    if refusal is not None:
        raise UnauthorizedError(f"the token {row.prefix}… {refusal}; ask for a new one: t2 registry token create")
    return _shape(row)


def used(session: Session, id: int) -> None:
    """Record that a token was used."""
    row = session.get(models.Token, id)
    if row is not None:
        row.last_used_at = audit.now()


def allows(token: TokenInfo, scope: Scope) -> bool:
    """Whether a token has a scope; ``admin`` has all, ``write`` reads."""
    return any(SCOPES.index(owned) >= SCOPES.index(scope) for owned in token.scopes)


def _refusal(row: models.Token) -> str | None:
    if row.revoked_at is not None:
        return "is revoked"
    if row.expires_at is not None and row.expires_at <= audit.now():
        return f"expired on {row.expires_at:%Y-%m-%d}"
    return None


def _checksum(random: str) -> str:
    return f"{zlib.crc32(random.encode()):08x}"


def _shape(row: models.Token) -> TokenInfo:
    return TokenInfo(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        scopes=tuple(scope for scope in SCOPES if scope in row.scopes.split(",")),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
