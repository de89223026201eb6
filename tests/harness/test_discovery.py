"""Stock lm-eval knows t2's model and tasks once t2 is installed, and Python never suffers from it."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest

from t2.harness import discovery
from tests import environments
from tests.environments import Environment

PTH = "t2_eval_discovery.pth"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.link_libraries(tmp_path_factory.mktemp("libraries") / "site")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environments.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory: pytest.TempPathFactory, libraries: Path, wheel: Path) -> Environment:
    environment = environments.create(tmp_path_factory.mktemp("from-wheel") / "env", libraries)
    environments.install(environment, str(wheel))
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Environment:
    folder = tmp_path_factory.mktemp("editable")
    source = environments.copy_repository(folder / "source")
    environment = environments.create(folder / "env", libraries)
    environments.install(environment, "--editable", str(source))
    return environment


@pytest.fixture(params=["from_wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> Environment:
    environment = request.getfixturevalue(request.param)
    assert isinstance(environment, Environment)
    return environment


@pytest.fixture
def damaged(tmp_path: Path, libraries: Path, wheel: Path) -> Environment:
    """An environment for one test to spoil."""
    environment = environments.create(tmp_path / "env", libraries)
    environments.install(environment, str(wheel))
    return environment


def evaluate(environment: Environment, code: str) -> str:
    done = environment.run("python", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_python_starts_without_importing_anything_of_it(installed: Environment) -> None:
    code = "import sys; print(sys.meta_path[0].__name__, *{name.partition('.')[0] for name in sys.modules})"
    hook, *imported = evaluate(installed, code).split()
    assert hook == "T2Discovery"
    assert not {"t2", "lm_eval", "torch", "numpy", "importlib"} & set(imported)


def test_the_program_is_there_and_tells_the_version(installed: Environment) -> None:
    project = tomllib.loads((environments.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert installed.run("t2", "--version").stdout == f"t2 {project['version']}\n"


def test_lm_eval_knows_the_model_and_still_its_own(installed: Environment) -> None:
    code = "import lm_eval.models as m; from lm_eval.api.registry import model_registry as r; print(r._objs['t2'], *r)"
    target, *names = evaluate(installed, code).split()
    assert target == discovery.MODEL_TARGET
    assert {"t2", "hf", "vllm", "dummy"} <= set(names)


def test_the_entry_point_names_the_same_class(installed: Environment) -> None:
    code = "from importlib.metadata import entry_points as e; print(*(p.value for p in e(group='lm_eval.models')))"
    assert evaluate(installed, code) == discovery.MODEL_TARGET


@pytest.mark.parametrize(
    "program",
    [
        ["python", "-m", "lm_eval"],
        ["python", "-c", "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"],
        ["t2", "eval"],
    ],
    ids=["module", "script", "t2 eval"],
)
def test_lm_eval_lists_the_tasks(installed: Environment, program: list[str]) -> None:
    done = installed.run(*program, "ls", "tasks")
    assert done.returncode == 0, done.stderr
    listed = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")}
    assert {"t2_arc_challenge", "arc_challenge", "gsm8k"} <= listed


def test_t2_eval_works_without_the_import_hook(damaged: Environment) -> None:
    (damaged.site / PTH).unlink()
    assert "t2_arc_challenge" not in damaged.run("python", "-m", "lm_eval", "ls", "tasks").stdout
    assert "t2_arc_challenge" in damaged.run("t2", "eval", "ls", "tasks").stdout


@pytest.mark.parametrize("damage", ["module missing", "package missing", "module corrupt"])
def test_a_damaged_install_leaves_python_and_lm_eval_alone(damaged: Environment, damage: str) -> None:
    module = damaged.site / "t2" / "harness" / "discovery.py"
    if damage == "module missing":
        module.unlink()
    elif damage == "package missing":
        (damaged.site / "t2").rename(damaged.root / "gone")
    else:
        module.write_bytes(b"\x00 not python (")
    for cached in damaged.site.glob("t2/harness/__pycache__/discovery.*"):
        cached.unlink()
    assert evaluate(damaged, "print('started')") == "started"
    assert evaluate(damaged, "import lm_eval.models; print('imported')") == "imported"


def test_a_name_that_is_taken_stays_as_it_is(from_wheel: Environment) -> None:
    code = """
from lm_eval.api.registry import model_registry as r
r.register("t2", target="someone:Else")
import lm_eval.models
print(r._objs["t2"])
"""
    assert evaluate(from_wheel, code) == "someone:Else"


def test_the_users_tasks_win_over_ours_and_ours_are_indexed_once(from_wheel: Environment, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: t2_arc_challenge\ndataset_path: own\n")
    code = f"""
from lm_eval.tasks import TaskManager
from t2.harness.discovery import install, tasks_folder
install()
index = TaskManager(include_path={str(tmp_path)!r}).task_index
print(index["t2_arc_challenge"].yaml_path, index["t2_arc_easy"].yaml_path.is_relative_to(tasks_folder()))
index = TaskManager(include_path=str(tasks_folder())).task_index
print("t2_arc_easy" in index)
"""
    done = from_wheel.run("python", "-c", code)
    assert done.stdout.splitlines() == [f"{tmp_path / 'own.yaml'} True", "True"]
    overridden = [line for line in done.stderr.splitlines() if "overrides" in line]
    assert len(overridden) == 1, done.stderr
    assert "t2_arc_challenge" in overridden[0]


def test_no_defaults_means_none_of_ours(from_wheel: Environment, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\ndataset_path: own\n")
    code = f"""
from lm_eval.tasks import TaskManager
print(TaskManager(include_defaults=False, include_path={str(tmp_path)!r}).all_tasks)
"""
    assert evaluate(from_wheel, code) == "['own']"


def test_without_the_eval_extra_one_line_names_the_command(tmp_path: Path, wheel: Path) -> None:
    libraries = environments.link_libraries(tmp_path / "site", without={"torch", "functorch", "torchgen"})
    environment = environments.create(tmp_path / "env", libraries)
    environments.install(environment, str(wheel))
    done = environment.run("python", "-m", "lm_eval", "--model", "t2", "--tasks", "arc_easy")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "t2: error: --model t2 needs torch, not part of the base install; run: pip install 't2-eval[eval]'"
    )


def test_the_wheel_holds_every_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        f"t2/{path.relative_to(environments.REPOSITORY)}"
        for folder in ("core", "adapters", "harness", "training", "registry", "api", "cli", "tasks_yaml", "migrations")
        for path in (environments.REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources | {PTH} == {name for name in names if ".dist-info/" not in name}
