"""Keyset pagination: a page begins after the sort value and id of the last row of the page before.

Its cost does not grow with the depth of the page, and rows added meanwhile neither repeat nor hide others.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Integer, Select, bindparam, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from t2.core.digests import canonical_json, digest_of
from t2.core.errors import InvalidRequestError
from t2.registry.names import MAX_NUMBER
from t2.registry.schemas import MAX_PAGE

_KEPT = 512
"""Statements that are kept; more kinds of queries than that are not asked again and again."""
_NONE: Mapping[str, Any] = MappingProxyType({})
_KINDS: dict[str, type] = {"t": datetime, "n": float, "s": str, "i": int}


@dataclass(frozen=True)
class Order:
    """A sort column that is never NULL among the rows, and the unique column that breaks its ties."""

    column: InstrumentedAttribute[Any]
    id: InstrumentedAttribute[int]
    descending: bool


def fetch_page(
    session: Session | Connection,
    statement: Select[*tuple[Any, ...]],
    order: Order,
    *,
    query: Any,
    cursor: str | None,
    limit: int,
    position: Callable[[Any], tuple[Any, int]],
    values: Mapping[str, Any] = _NONE,
    kept: bool = False,
) -> tuple[Sequence[Any], str | None]:
    """The rows of one page, and the cursor of the next one or None.

    Args:
        statement: without order and limit.
        query: JSON that says what was asked for; a cursor is good for the query it came from.
        cursor: where the page before ended; None for the first.
        limit: rows.
        position: the sort value and the id of a row.
        values: of the statement's parameters.
        kept: the statement was made once and is asked for again and again: so is what is made of it here, for building
            a statement takes as long as half of the database's work.

    Raises:
        InvalidRequestError: the limit is out of range, or the cursor is damaged or of another query.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(f"limit: {limit} is not between 1 and {MAX_PAGE}")
    asked: dict[str, Any] = {**values, "page_rows": limit + 1}
    if cursor is not None:
        after = _decode(cursor, query, order.column.type.python_type)
        asked |= (
            {"page_value": after[0], "page_id": after[1]} if order.column is not order.id else {"page_id": after[1]}
        )
    page = (_kept_page if kept else _page)(statement, order, cursor is not None)
    rows = session.execute(page, asked).all()
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], _encode(position(rows[limit - 1]), query)


def _page(statement: Select[*tuple[Any, ...]], order: Order, later: bool) -> Select[*tuple[Any, ...]]:
    """A page of a statement's rows: the first one, or one after ``page_value`` and ``page_id``."""
    columns: tuple[Any, ...] = (order.column, order.id) if order.column is not order.id else (order.id,)
    if later:
        names = ("page_value", "page_id")[-len(columns) :]
        after = [bindparam(name, type_=column.type) for name, column in zip(names, columns, strict=True)]
        left: Any = tuple_(*columns) if len(columns) > 1 else columns[0]
        right: Any = tuple_(*after) if len(columns) > 1 else after[0]
        statement = statement.where(left < right if order.descending else left > right)
    statement = statement.order_by(*(column.desc() if order.descending else column.asc() for column in columns))
    return statement.limit(bindparam("page_rows", type_=Integer))


_kept_page = lru_cache(_KEPT)(_page)


def _encode(position: tuple[Any, int], query: Any) -> str:
    value = position[0]
    kind = next(code for code, type_ in _KINDS.items() if type(value) is type_)
    plain = value.isoformat() if isinstance(value, datetime) else value
    text = canonical_json([digest_of(query)[:16], kind, plain, position[1]])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(cursor: str, query: Any, wanted: type) -> list[Any]:
    """The sort value, of the wanted type, and the id."""
    try:
        asked, kind, plain, last = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        value = datetime.fromisoformat(plain) if kind == "t" else plain
        if type(value) is not _KINDS[kind] or type(last) is not int or not 0 <= last <= MAX_NUMBER:
            raise ValueError("not a position")
    except (ValueError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise InvalidRequestError("cursor: it is damaged; begin again without one") from error
    if asked != digest_of(query)[:16]:
        raise InvalidRequestError("cursor: it belongs to another query; begin again without one")
    try:
        if type(value) is not wanted:
            raise ValueError("of another type")
        if isinstance(value, datetime):
            if value.tzinfo is None:
                raise ValueError("without an offset from UTC")
            value = value.astimezone(UTC)
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("what no name has")
        if isinstance(value, int) and not 0 <= value <= MAX_NUMBER:
            raise ValueError("beyond the database's integers")
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError("cursor: it is damaged; begin again without one") from error
    return [value, last]
