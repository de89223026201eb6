"""Parts of statements that look rows up by their ids, as fast as the database can."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import ARRAY, BindParameter, Boolean, ColumnElement, Dialect, Integer, Text, TypeDecorator, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeEngine

from t2.registry.db.models import Table


def columns(table: type[Table]) -> Any:
    """The columns of a table, for a query whose rows are no objects of the session: it takes two thirds of the time."""
    return table.__table__.c


class _Ids(TypeDecorator[list[int]]):
    """Ids in one parameter: an array, or JSON in SQLite, which has no arrays."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else ARRAY(Integer))

    def process_bind_param(self, value: list[int] | None, dialect: Dialect) -> Any:
        return json.dumps(value) if dialect.name == "sqlite" else value


class _Among(ColumnElement[bool]):
    inherit_cache = True
    _traverse_internals = [  # noqa: RUF012 - declared so by SQLAlchemy
        ("column", InternalTraversal.dp_clauseelement),
        ("ids", InternalTraversal.dp_clauseelement),
    ]

    def __init__(self, column: ColumnElement[int], ids: BindParameter[list[int]]) -> None:
        self.column, self.ids, self.type = column, ids, Boolean()


@compiles(_Among)
def _array(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    return f"{compiler.process(element.column, **options)} = ANY ({compiler.process(element.ids, **options)})"


@compiles(_Among, "sqlite")
def _json(element: _Among, compiler: SQLCompiler, **options: Any) -> str:
    ids = compiler.process(element.ids, **options)
    return f"{compiler.process(element.column, **options)} IN (SELECT value FROM json_each({ids}))"


def any_of(column: ColumnElement[int], parameter: str) -> ColumnElement[bool]:
    """``column IN (…)`` for a list of ids, which is given by this name when the statement is executed.

    They are one parameter, however many they are, so the statement is always the same and prepared but once.
    """
    return _Among(column, bindparam(parameter, type_=_Ids()))
