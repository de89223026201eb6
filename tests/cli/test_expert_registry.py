"""``t2 expert`` on a registry: publish, find, look at, move aliases, delete; embedded, and against a server."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2.core.curve import CurvePoint, append_point
from t2.core.digests import sha256
from t2.core.errors import ArgumentError, InvalidRequestError
from t2.core.expertfile import decode_expert, read_expert
from t2.core.manifest import Parent
from t2.core.references import ExpertName
from t2.harness.publishing import push
from t2.harness.registry import registry
from t2.registry.open import open_embedded
from t2.registry.portable.exporting import export
from t2.registry.portable.importing import restore
from t2.registry.services import service
from t2.registry.services.doctor import examine
from tests.cli.here import Here
from tests.registry.samples import FINGERPRINT, expert_bytes
from tests.registry.serving import process


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a registry and experts of one's own."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(folder: Path, seed: int, scores: tuple[float, ...] = (0.25, 0.5), **fields: Any) -> Path:
    """A folder as ``t2 train`` leaves it."""
    folder.mkdir(parents=True)
    (folder / "expert.safetensors").write_bytes(expert_bytes(seed, **{"name": folder.name, **fields}))
    for step, score in enumerate(scores):
        append_point(
            folder / "curve.jsonl", CurvePoint(step=step, split="validation", reward=score, score=score, seconds=step)
        )
    (folder / "scores.json").write_text(
        json.dumps({"best_score": max(scores), "base_score": scores[0], "best_reward": 1.5, "base_reward": -1})
    )
    targets = {f"model.layers.{layer}.mlp.up_proj.weight": 8 for layer in range(6)}
    base = {"base": {"id": "org/model", "revision": None, "fingerprint": FINGERPRINT}, "targets": targets}
    (folder / "base.json").write_text(json.dumps(base))
    return folder


def test_a_trained_expert_is_pushed_with_all_that_lies_beside_it(home: Path, here: Here) -> None:
    folder = trained(home / "experts" / "science", 1)
    pushed = here.fields("expert", "push", folder, "team/science", "--alias", "production", "--tag", "paper")
    digest = read_expert(folder / "expert.safetensors").digest
    assert (pushed["published"], pushed["digest"], pushed["aliases"]) == ("team/science@1", digest, "production")
    shown = here.fields("expert", "show", "team/science")
    scores = ("validation.score", "validation.base_score", "validation.reward")
    assert [shown[score] for score in scores] == ["0.5", "0.25", "1.5"]
    assert (shown["tags"], shown["curve"]) == ("paper", "2 points")
    assert shown["validation score"] == "▁█ 0.25 → 0.5, best 0.5"
    again = here.fields("expert", "push", "science", "team/science", "--metric", "acc=0.75")
    assert again["published"] == "team/science@1, which was there already"
    assert again["acc"] == "0.75"
    with open_embedded(home / "registry") as client:
        assert client.curve(ExpertName("team", "science"), 1).total == 2
        assert len(client.get_base_model(FINGERPRINT).targets or ()) == 6


def test_a_bare_name_and_a_mixtures_parents(home: Path, here: Here) -> None:
    parent = here.json("expert", "push", trained(home / "experts" / "one", 1))
    assert parent["name"] == "default/one"
    mixture = home / "both.safetensors"
    parents = (Parent(digest=parent["digest"], alpha=0.3),)
    mixture.write_bytes(expert_bytes(2, kind="mixture", name="both", parents=parents))
    here("expert", "push", mixture, "team/both")
    told = here("expert", "show", "default/one", "--lineage").splitlines()[-1].split()
    assert told == ["team/both@1", "0.3", "default/one@1"]
    tree = here.json("expert", "show", "team/both", "--lineage")["lineage"]
    assert tree["edges"] == [{"child": tree["root"], "parent": parent["digest"], "alpha": 0.3}]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with three experts, and one that was never pushed."""
    home = tmp_path_factory.mktemp("filled")
    math = trained(home / "runs" / "math", 1)
    code = trained(home / "runs" / "code", 2, (0.125, 0.75), domain="code", task="t2_mbpp")
    labels = trained(home / "runs" / "labels", 3, domain=None, task=None, kind="classifier")
    with registry(str(home / "registry")) as client:
        push(client, ExpertName("team", "math"), math / "expert.safetensors", tags=["paper"], metrics={"acc": 0.7})
        push(client, ExpertName("team", "code"), code / "expert.safetensors")
        push(client, ExpertName("default", "alone"), labels / "expert.safetensors")
    trained(home / "experts" / "mine", 4)
    return home


@pytest.fixture
def shelf(home: Path, filled: Path) -> Path:
    """The same, to change."""
    shutil.copytree(filled, home, dirs_exist_ok=True)
    return home


def test_the_list_shows_the_registry_and_what_was_never_pushed(shelf: Path, here: Here) -> None:
    rows = here.table("expert", "list")
    assert [row["name"] for row in rows] == [
        "mine",
        "default/alone",
        *(f"demo/{name}" for name in ("classifier", "code", "math", "reasoning")),
        "team/code",
        "team/math",
    ]
    mine, code = rows[0], rows[-2]
    assert (mine["version"], mine["score"]) == ("-", "0.5")
    assert mine["file"] == str(shelf / "experts" / "mine" / "expert.safetensors")
    assert (code["domain"], code["task"], code["score"], code["base model"]) == ("code", "t2_mbpp", "0.75", "org/model")
    here("expert", "push", "mine", "team/mine")
    assert "mine" not in [row["name"] for row in here.table("expert", "list")]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--namespace", "team"], ["team/code", "team/math"]),
        (["--namespace", "team", "--sort", "-score"], ["team/code", "team/math"]),
        (["--namespace", "team", "--sort", "score"], ["team/math", "team/code"]),
        (["--domain", "code", "--base", "org/model"], ["team/code"]),
        (["--base", FINGERPRINT], ["default/alone", "team/code", "team/math"]),
        (["--task", "t2_mbpp"], ["team/code"]),
        (["--kind", "classifier", "--namespace", "default"], ["default/alone"]),
        (["--tag", "paper"], ["team/math"]),
        (["--metric", "acc>=0.7", "--metric", "acc <= 0.7"], ["team/math"]),
        (["--metric", "acc>=0.71"], []),
        (["--metric", "validation.score=0.75"], ["team/code"]),
        (["--text", "ALON"], ["default/alone"]),
        (["--namespace", "team", "--limit", "1"], ["team/code"]),
        (["--namespace", "team", "--limit", "1", "--all"], ["team/code", "team/math"]),
        (["--deleted"], []),
    ],
)
def test_the_list_is_narrowed(options: list[str], names: list[str], shelf: Path, here: Here) -> None:
    assert [row["name"] for row in here.table("expert", "list", *options)] == names
    assert [entry["name"] for entry in here.json("expert", "list", *options)] == names


def test_versions_and_the_curve_are_shown_on_demand(shelf: Path, here: Here) -> None:
    here("expert", "push", trained(shelf / "runs" / "more", 9), "team/math", "--description", "longer")
    told = here.json("expert", "show", "team/math", "--versions", "--curve")
    assert [version["version"] for version in told["versions"]] == [2, 1]
    assert [point["score"] for point in told["curve"]] == [0.25, 0.5]
    lines = here("expert", "show", "team/math@1", "--versions").splitlines()
    assert lines[-2].split()[-1] == "longer"
    last = here("expert", "show", "team/math", "--curve").splitlines()[-1]
    assert last.split()[:4] == ["1", "validation", "0.5", "0.5"]
    beside = here.fields("expert", "show", shelf / "runs" / "math")
    assert (beside["validation.score"], beside["curve"]) == ("0.5", "2 points")
    assert "are for experts of a registry" in here.refused("expert", "show", shelf / "runs" / "math", "--versions")


def test_what_is_pulled_is_what_was_pushed(shelf: Path, here: Here) -> None:
    file = shelf / "runs" / "math" / "expert.safetensors"
    assert here.fields("expert", "pull", "team/math")["file"] == "math.safetensors"
    assert (shelf / "math.safetensors").read_bytes() == file.read_bytes()
    here("expert", "pull", "team/math@1")  # the same again is no loss
    assert "exists and is another expert" in here.refused("expert", "pull", "team/code", "-o", "math.safetensors")
    here("expert", "pull", "team/code", "-o", "math.safetensors", "--overwrite")
    here("expert", "pull", f"@sha256:{read_expert(file).digest}", "-o", shelf / "runs")
    assert (shelf / "runs" / f"{read_expert(file).digest[:12]}.safetensors").read_bytes() == file.read_bytes()


def test_files_and_references_are_verified(shelf: Path, here: Here) -> None:
    file = shelf / "runs" / "math" / "expert.safetensors"
    digest = read_expert(file).digest
    assert here("expert", "verify", file, "team/math") == f"{digest}  {file}\n{digest}  team/math@1\n"
    blob = next(path for path in (shelf / "registry" / "blobs").rglob("*") if digest in path.name)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    assert here("expert", "verify", "team/math", "team/code").endswith("  team/code@1\n")
    assert here.code == 2
    assert digest in here.errors


def test_the_list_shows_aliases_of_older_versions(shelf: Path, here: Here) -> None:
    here("expert", "alias", "team/math", "production", 1)
    assert here.table("expert", "list", "--text", "team/math")[0]["aliases"] == "production"
    here("expert", "push", trained(shelf / "runs" / "more", 9), "team/math", "--alias", "next")
    row = here.table("expert", "list", "--text", "team/math")[0]
    assert (row["version"], row["aliases"]) == ("2", "next, production → 1")
    assert here.json("expert", "list", "--text", "team/math")[0]["aliases"] == {"next": 2, "production": 1}


def test_what_an_upload_refuses_is_not_verified(shelf: Path, here: Here) -> None:
    whole = expert_bytes(1)
    size = int.from_bytes(whole[:8], "little")
    (shelf / "spaced.safetensors").write_bytes((size + 8).to_bytes(8, "little") + b" " * 8 + whole[8:])
    (shelf / "long.safetensors").write_bytes(expert_bytes(1, domain="x" * 201))
    (shelf / "nul.safetensors").write_bytes(expert_bytes(1, training={"note": "\x00"}))
    for name, why in [("spaced", "not canonical"), ("long", "manifest field domain"), ("nul", "NUL")]:
        file = shelf / f"{name}.safetensors"
        assert here("expert", "verify", file) == ""
        assert here.code == 2
        assert why in here.errors
        assert why in here.refused("expert", "push", file, f"team/{name}")
        with registry(str(shelf / "registry")) as client, pytest.raises(InvalidRequestError, match=why):
            client.publish(ExpertName("team", name), file.read_bytes())


def test_fix_rewrites_a_file_of_another_layout(shelf: Path, here: Here) -> None:
    whole = expert_bytes(1)
    size = int.from_bytes(whole[:8], "little")
    file = shelf / "spaced.safetensors"
    file.write_bytes((size + 8).to_bytes(8, "little") + whole[8 : 8 + size] + b" " * 8 + whole[8 + size :])
    assert here("expert", "verify", "--fix", file) == f"{sha256(whole)}  {file}\n"
    assert file.read_bytes() == whole
    here("expert", "verify", "--fix", "team/math")
    assert here.code == 2
    assert "a registry never rewrites one" in here.errors


def test_a_registrys_file_of_another_layout_stays_of_use(shelf: Path, here: Here) -> None:
    """It was uploaded before layouts were checked."""
    whole = expert_bytes(8)
    size = int.from_bytes(whole[:8], "little")
    padded = (size + 8).to_bytes(8, "little") + whole[8 : 8 + size] + b" " * 8 + whole[8 + size :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "decode_expert", lambda data, source, **_: decode_expert(data, source, canonical=False))
        with registry(str(shelf / "registry")) as client:
            digest = client.publish(ExpertName("team", "old"), padded).digest
    here("expert", "pull", f"team/old@sha256:{digest}")
    assert (shelf / "old.safetensors").read_bytes() == padded
    assert read_expert(shelf / "old.safetensors").digest == digest
    assert here("expert", "verify", "team/old") == ""
    assert "not canonical" in here.errors
    archive = io.BytesIO()
    with open_embedded(shelf / "registry") as one, open_embedded(shelf / "other") as other:
        assert [finding for finding in examine(one.database, one.store, deep=True) if finding.wrong] == []
        export(one.database, one.store, archive)
        archive.seek(0)
        restore(other.database, other.store, other.actor, archive)
        assert other.download(digest) == padded


def test_aliases_tags_and_descriptions_change(shelf: Path, here: Here) -> None:
    here("expert", "push", trained(shelf / "runs" / "more", 9), "team/math")
    here("expert", "alias", "team/math", "production", 1, "--reason", "first")
    (row,) = here.table("expert", "alias", "team/math", "production", 2)
    assert (row["alias"], row["version"]) == ("production", "2")
    here("expert", "alias", "team/math", "production", "--delete")
    history = here.table("expert", "alias", "team/math", "--history")
    assert [(row["from"], row["to"], row["reason"]) for row in history] == [
        ("2", "-", "-"),
        ("1", "2", "-"),
        ("-", "1", "first"),
    ]
    assert here.json("expert", "alias", "team/math") == []
    assert here("expert", "alias", "team/math") == "team/math has no aliases\n"
    assert here.json("expert", "tag", "team/math", "reviewed", "--remove", "paper") == ["reviewed"]
    assert here("expert", "tag", "team/math") == "reviewed\n"
    assert here("expert", "describe", "team/math", "Sums in steps") == "described team/math\n"
    assert [entry["description"] for entry in here.json("expert", "list", "--text", "sums")] == ["Sums in steps"]
    assert here.fields("expert", "show", "team/math")["about"] == "Sums in steps"


def test_what_is_deleted_can_be_restored(shelf: Path, here: Here) -> None:
    here("expert", "push", trained(shelf / "runs" / "more", 9), "team/math", "--alias", "production")
    assert "move or remove the alias first" in here.refused("expert", "delete", "team/math@2")
    assert "t2 expert restore team/math@1 brings it back" in here("expert", "delete", "team/math@1")
    assert "is deleted; it can be restored" in here.refused("expert", "show", "team/math@1")
    assert here("expert", "restore", "team/math@1") == "restored team/math@1\n"
    assert here("expert", "list", "--deleted") == "no experts\n"
    assert here.json("expert", "delete", "team/math") == {"deleted": "team/math"}
    assert [row["name"] for row in here.table("expert", "list", "--deleted")] == ["team/math"]
    assert here.json("expert", "restore", "team/math") == {"restored": "team/math"}
    assert here.fields("expert", "show", "team/math@1")["name"] == "team/math@1"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["push", "nothing"], "nothing is neither an expert in"),
        (["push", "mine", "Team/Mine"], "'Team/Mine' is not an expert's name"),
        (["push", "mine", "--metric", "acc"], "write a name, = and a number: acc=0.75"),
        (["push", "mine", "--metric", "acc=nan"], "write a name, = and a number"),
        (["push", "mine", "--alias", "Prod"], "'Prod' is not an alias"),
        (["push", "runs/labels", "team/math"], "is of kind expert"),
        (["show", "team/mth"], "did you mean 'team/math'?"),
        (["list", "--sort", "socre"], "--sort socre is not one; did you mean 'score'?"),
        (["list", "--kind", "experts"], "did you mean 'expert'?"),
        (["list", "--metric", "acc"], "write a metric, >=, <= or =, and a number"),
        (["list", "runs", "--tag", "paper"], "leave out the paths"),
        (["alias", "team/math", "production", "9"], "there is no version 9"),
        (["alias", "team/math", "--delete"], "--delete removes one alias"),
        (["alias", "team/math", "--reason", "x"], "--reason is for a change"),
        (["delete", "team/math@production"], "name an expert, namespace/name, or one version by its number"),
        (["tag", "team/math", "no spaces"], "tag 'no spaces': write 1 to 100 ASCII letters"),
        (["push", "mine", "--tag", "no spaces"], "tag 'no spaces': write 1 to 100 ASCII letters"),
        (["list", "--tag", "no spaces"], "tag 'no spaces': write 1 to 100 ASCII letters"),
        (["alias", "team/math", "prod"], "team/math has no alias prod"),
        (["pull", "team/math@"], "is not a reference"),
    ],
)
def test_a_slip_is_one_line(arguments: list[str], line: str, shelf: Path, here: Here) -> None:
    assert line in here.refused("expert", *arguments)


def test_a_registry_of_ones_own_that_cannot_be_made_leaves_the_files(
    home: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(home / "experts" / "mine", 4)
    (home / "data").write_text("a file where the folder would be")
    monkeypatch.delenv("T2_REGISTRY_URL")
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    assert [line.split()[0] for line in here("expert", "list").splitlines()[1:]] == [
        "mine",
        "demo/classifier",
        "demo/code",
        "demo/math",
        "demo/reasoning",
    ]
    assert here.code == 2
    assert here.errors.startswith("t2: error: cannot create the folder")
    assert here.fields("expert", "show", "demo/math")["name"] == "math"


def test_what_others_wrote_does_not_steer_the_terminal(shelf: Path, here: Here) -> None:
    here("expert", "push", "mine", "team/mine", "--description", "\x1b[2Jfirst line\nsecond")
    assert here.fields("expert", "show", "team/mine")["description"] == r"\x1b[2Jfirst line\nsecond"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that runs in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    with process(T2_REGISTRY_URL=str(folder / "registry")) as (_, url):
        yield url


def test_a_server_is_spoken_to_in_the_same_way(
    server: str, home: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(home / "experts" / "science", 1)
    at = ("--registry", server)
    here("expert", "push", folder, "team/science", "--alias", "production", "--tag", "paper", *at)
    monkeypatch.setenv("T2_REGISTRY_URL", server)
    (row,) = here.table("expert", "list", "--metric", "validation.score>=0.5", "--tag", "paper")
    assert (row["name"], row["version"], row["aliases"], row["score"]) == ("team/science", "1", "production", "0.5")
    shown = here.fields("expert", "show", "team/science@production")
    assert (shown["name"], shown["curve"]) == ("team/science@1", "2 points")
    assert here("expert", "verify", "team/science").endswith("  team/science@1\n")
    here("expert", "pull", "team/science")
    assert (home / "science.safetensors").read_bytes() == (folder / "expert.safetensors").read_bytes()
    assert "did you mean 'team/science'?" in here.refused("expert", "show", "team/sciense")
    # Seeded is only what is embedded.
    assert [entry["name"] for entry in here.json("expert", "list")] == ["team/science"]
    with pytest.raises(ArgumentError):
        here("expert", "list", "--registry", "http://")


def test_the_registry_needs_none_of_the_model_libraries(shelf: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, lm_eval=None, transformers=None)\n"
        "from t2.cli.main import app\n"
        "for line in sys.argv[1:]: app(line.split(), standalone_mode=False)"
    )
    lines = ["expert push mine team/mine --alias production", "expert verify team/mine@production", "expert list"]
    command = [sys.executable, "-c", code, *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "team/mine@1" in done.stdout
