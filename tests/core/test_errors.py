"""Every error is one line, and an unknown name gets the nearest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2.core import errors
from t2.core.errors import T2Error, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, T2Error)]


@given(st.text(), st.sampled_from(KINDS))
def test_an_error_is_one_line(text: str, kind: type[T2Error]) -> None:
    assert len(str(kind(text)).splitlines()) <= 1
    assert str(kind(f"first\n   {text}")).startswith("first")


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("popluation", ["population", "generations"], "; did you mean 'population'?"),
        ("x", ["b", "a", "b"], "; known: a, b"),
        ("x", [], "; none exist"),
        ("zzz", [f"n{i:02}" for i in range(30)], f"; known: {', '.join(f'n{i:02}' for i in range(20))}, …"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == expected
