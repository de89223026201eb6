"""``t2 expert import``, ``extract``, ``mix`` and ``merge`` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.cli.main import app
from t2.core.errors import T2Error
from t2.core.expertfile import read_expert
from tests.cli.test_main import fails_with_one_line, t2
from tests.harness import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:
    """A folder of experts with ``alpha`` and ``beta``."""
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    engine = tiny.engine_of(base)
    for seed, name in enumerate(["alpha", "beta"]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", engine, seed)
    return tmp_path / "experts"


class Here:
    """Runs the program in this process, which has loaded PyTorch already."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> dict[str, str]:
        self.capsys.readouterr()
        app([str(argument) for argument in arguments], standalone_mode=False)
        return fields(self.capsys.readouterr().out)

    def refused(self, *arguments: str | Path) -> str:
        with pytest.raises(T2Error) as caught:
            self(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def fields(text: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_a_public_checkpoint_is_imported_and_a_bad_one_told_in_a_line(
    here: Here, base: Path, home: Path, tmp_path: Path
) -> None:
    engine = tiny.engine_of(base)
    ranks = [rank for name, rank in engine.ranks().items() if "mlp" in name]
    params = {f"learnable_params_module_list.{i}": torch.full((rank,), 0.1) for i, rank in enumerate(ranks)}
    torch.save(params, tmp_path / "policy_params.pt")
    arguments = ("expert", "import", tmp_path / "policy_params.pt", "--model-args", f"pretrained={base},device=cpu")
    told = here(*arguments, "--name", "theirs", "--domain", "math", "--task", "gsm8k", "--max-mult", "1.5")
    expert = read_expert(home / "theirs" / "expert.safetensors")
    assert (told["digest"], told["expert"]) == (expert.digest, str(home / "theirs" / "expert.safetensors"))
    assert (expert.manifest.domain, expert.manifest.task) == ("math", "gsm8k")
    assert expert.manifest.training["max_mult"] == 1.5
    assert "exists" in here.refused(*arguments, "--name", "theirs")
    assert here(*arguments, "--name", "theirs", "--overwrite", "--output", home)["digest"] != expert.digest
    params.popitem()
    torch.save(params, tmp_path / "policy_params.pt")
    assert f"has {len(ranks) - 1} vectors" in here.refused(*arguments, "--name", "fewer")
    (tmp_path / "policy_params.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    line = fails_with_one_line(t2(*arguments, "--name", "evil"))
    assert "was not opened" in line
    assert "os.system" in line


def test_experts_are_mixed_merged_and_found_again(here: Here, base: Path, home: Path, tmp_path: Path) -> None:
    model_args = f"pretrained={base},device=cpu"
    recipe = ("--experts", "alpha+beta", "--alpha", "0.7+0.6", "--space", "delta", "--normalise", "sum")
    here("expert", "mix", *recipe, "--name", "both", "--domain", "x")
    both = read_expert(home / "both" / "expert.safetensors")
    assert (both.manifest.kind, both.manifest.method, both.manifest.domain) == ("mixture", "mix", "x")
    alpha = [read_expert(home / f"{name}.safetensors").digest for name in ("alpha", "beta")]
    assert [(p.digest, p.alpha) for p in both.manifest.parents] == list(zip(alpha, (0.7, 0.6), strict=True))
    folder = tmp_path / "merged"
    told = here("expert", "merge", folder, *recipe, "--model-args", model_args)
    assert told["mixture"] == "alpha 0.7, beta 0.6"
    engine = tiny.engine_of(base)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = plain.state_dict()
    with engine.applied({name: torch.from_numpy(vector) for name, vector in both.vectors.items()}):
        assert all(torch.equal(value, state[name]) for name, value in engine.model.state_dict().items())
    assert json.loads((folder / "t2_merge.json").read_text())["alpha"] == {"alpha": 0.7, "beta": 0.6}
    assert "not empty" in here.refused("expert", "merge", folder, "--experts", "alpha")
    tuned_args = ("--tuned-args", "device=cpu", "--model-args", model_args)
    told = here("expert", "extract", folder, "--name", "back", *tuned_args, "--domain", "y", "--task", "z")
    assert "unexplained" in told["note"]
    back = read_expert(home / "back" / "expert.safetensors")
    assert back.manifest.method == "extracted from a checkpoint"
    for name, vector in both.vectors.items():
        assert abs(back.vectors[name][:20] - vector[:20]).max() < 1e-4


def test_a_fine_tune_is_refused_with_its_share(here: Here, base: Path, home: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1 * torch.randn(64, 32, generator=torch.manual_seed(0))
    model.save_pretrained(tmp_path / "tuned")
    tiny.tokenizer().save_pretrained(tmp_path / "tuned")
    arguments = ("expert", "extract", tmp_path / "tuned", "--name", "x", "--tuned-args", "device=cpu")
    line = here.refused(*arguments, "--model-args", f"pretrained={base},device=cpu", "--tolerance", "0.2")
    assert re.search(r"9\d\.\d% of the difference", line)
    assert "worst model.layers.0.mlp.up_proj.weight" in line
    assert not (home / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["import", "missing.pt", "--name", "x"], "missing.pt is not a file"),
        (["import", "missing.pt", "--name", "x y"], "name=x y must be"),
        (["mix", "--experts", "alpah+beta", "--name", "x"], "did you mean 'alpha'"),
        (["mix", "--experts", "alpha+beta", "--alpha", "1", "--name", "x"], "1 coefficients for the 2 experts"),
        (["mix", "--experts", "alpha", "--model-args", "dtype=float32", "--name", "x"], "only --rescale nuclear"),
        (["mix", "--experts", "", "--name", "x"], "a name is empty"),
        (["mix", "--experts", "alpha", "--rescale", "nuclear", "--name", "x y"], "name=x y must be"),
        (["mix", "--experts", "alpha", "--space", "papr", "--name", "x"], "did you mean 'paper'"),
        (["merge", "merged", "--experts", "alpha", "--model-args", "dtyp=float32"], "did you mean 'dtype'"),
        (
            ["merge", "merged", "--experts", "alpha", "--model-args", "float32"],
            "'float32' is not of the form key=value",
        ),
        (["merge", "merged", "--experts", "alpha", "--model-args", "pretrained=/absent"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str, here: Here, home: Path) -> None:
    assert says in here.refused("expert", *arguments)
