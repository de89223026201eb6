"""The example of the documentation runs, embedded and over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from t2.registry.open import open_embedded
from tests.registry.cells import SETTINGS, serve
from tests.registry.samples import expert_bytes

DOCS = Path(__file__).parents[2] / "docs" / "registry.md"


@pytest.mark.parametrize("access", ["embedded", "http"])
def test_the_example(
    access: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"## From Python\n.*?```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    data = expert_bytes(1, training={"steps": 3})
    (tmp_path / "expert.safetensors").write_bytes(data)
    if access == "embedded":
        monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
        exec(code, {})  # noqa: S102 - our own documentation
    else:
        with serve(open_embedded(tmp_path / "registry"), SETTINGS) as url:
            monkeypatch.setenv("T2_REGISTRY_URL", url)
            exec(code, {})  # noqa: S102 - our own documentation
    first, listed, fetched, refused, unknown = capsys.readouterr().out.splitlines()
    assert first.startswith("team/math@1 ")
    assert listed == "team/math ('lang=en',) {'kl': 0.02, 'validation.score': 0.71}"
    assert fetched == f"{len(data)} {{'steps': 3}}"
    assert "alias production" in refused
    assert unknown == "there is no expert team/maths"


@pytest.mark.parametrize(
    ("where", "without"),
    [
        ("http://localhost:1", {"sqlalchemy", "alembic", "boto3", "fastapi"}),
        ("folder", {"boto3", "psycopg", "fastapi"}),
    ],
)
def test_a_way_to_a_registry_imports_what_it_needs(tmp_path: Path, where: str, without: set[str]) -> None:
    program = "import sys; from t2.registry.open import open_registry; open_registry(sys.argv[1]).close()"
    program += "; print(*{name.partition('.')[0] for name in sys.modules})"
    where = where if "://" in where else str(tmp_path / where)
    done = subprocess.run([sys.executable, "-c", program, where], capture_output=True, text=True, check=True)
    assert not without & set(done.stdout.split())
