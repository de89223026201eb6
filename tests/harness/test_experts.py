from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, ExpertFileError, ExpertMismatchError, NotFoundError, T2Error
from t2.harness.args import parse_args
from t2.harness.catalogue import find_expert
from t2.harness.defaults import default_experts
from t2.harness.experts import prepare_experts, read_experts
from tests.harness import tiny


def test_names_files_and_folders_find_the_same_expert(experts: str, tmp_path: Path) -> None:
    named = read_experts(["alpha"])[0]
    folder = tmp_path / "experts" / "own"
    folder.mkdir()
    (folder / "expert.safetensors").write_bytes((tmp_path / "experts" / "alpha.safetensors").read_bytes())
    for name in (str(tmp_path / "experts" / "alpha.safetensors"), str(folder), "own"):
        assert read_experts([name])[0].digest == named.digest


def test_a_folder_of_many_experts_stands_for_all_of_them(
    experts: str, tmp_path: Path, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "experts"
    for number in range(40):
        tiny.save_expert(folder / "many" / f"e{number:02}.safetensors", tiny_engine, number, layers=[0])
    tiny.save_expert(folder / "many" / "own" / "expert.safetensors", tiny_engine, 99)
    read = read_experts([str(folder / "many"), "beta"])
    assert [e.name for e in read] == [*(f"e{number:02}" for number in range(40)), "expert", "beta"]
    monkeypatch.chdir(folder)
    assert [e.digest for e in read_experts(["many/"])] == [e.digest for e in read[:-1]]
    with pytest.raises(ArgumentError, match=r"e07.* is the same file as another"):
        read_experts(["many", "many/e07.safetensors"])


def test_without_names_there_is_one_expert_per_domain_of_this_base(
    experts: str, tmp_path: Path, tiny_engine: TransformersEngine
) -> None:
    folder = tmp_path / "experts"
    tiny.save_expert(folder / "zeta.safetensors", tiny_engine, 9, domain="math")
    foreign = tiny_engine.base.model_copy(update={"fingerprint": "f" * 64})
    tiny.save_expert(folder / "eta.safetensors", tiny_engine, 8, domain="law", base=foreign)
    tiny.save_expert(folder / "labels.safetensors", tiny_engine, 7, domain="any", kind="classifier")
    (folder / "broken.safetensors").write_bytes(b"half")
    assert [expert.name for expert in default_experts(tiny_engine.base)] == ["alpha", "beta", "gamma"]


def test_no_expert_for_this_base_is_told(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(ArgumentError, match="train one with t2 train, or name one with experts="):
        default_experts(tiny_engine.base.model_copy(update={"fingerprint": "e" * 64}))


def test_experts_of_one_name_stay_apart(tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    one = tiny.save_expert(tmp_path / "a" / "same.safetensors", tiny_engine, 1)
    two = tiny.save_expert(tmp_path / "b" / "same.safetensors", tiny_engine, 2)
    first, second = read_experts([str(one), str(two)])
    assert first.name == f"same-{first.digest[:8]}"
    assert first.name != second.name


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("alhpa", NotFoundError, "did you mean 'alpha'?"),
        ("alpha@best", NotFoundError, "there is no expert default/alpha"),
        ("nothing", ArgumentError, "holds 0 .safetensors files; name one of them"),
        ("cut.safetensors", ExpertFileError, "truncated"),
        ("nan.safetensors", ExpertFileError, "values must be finite"),
        ("labels.safetensors", ArgumentError, "is a classifier"),
    ],
)
def test_a_bad_expert_is_told_in_one_line(
    name: str,
    error: type[T2Error],
    line: str,
    experts: str,
    tmp_path: Path,
    tiny_engine: TransformersEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    good = (tmp_path / "experts" / "alpha.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(good[:-100])
    Path("nan.safetensors").write_bytes(good[:-4] + b"\x00\x00\xc0\x7f")
    tiny.save_expert(tmp_path / "labels.safetensors", tiny_engine, 5, kind="classifier")
    with pytest.raises(error) as caught:
        read_experts([name])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_file_twice_is_told(experts: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="same file as another"):
        read_experts(["alpha", str(find_expert("alpha"))])


def test_another_base_is_refused_unless_transfer_is_strict(tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    foreign = tiny_engine.base.model_copy(update={"fingerprint": "f" * 64, "id": "other"})
    path = tiny.save_expert(tmp_path / "x.safetensors", tiny_engine, 1, base=foreign)
    read = read_experts([str(path)])
    with pytest.raises(ExpertMismatchError, match="transfer=strict applies it all the same"):
        prepare_experts(parse_args({"adapt": "expert"}), read, tiny_engine.base, tiny_engine.ranks())
    strict = parse_args({"adapt": "expert", "transfer": "strict"})
    assert prepare_experts(strict, read, tiny_engine.base, tiny_engine.ranks())[0].digest == read[0].digest


def test_wrong_ranks_are_refused_even_then(tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    larger = tiny.engine_of(tiny.save_model(tmp_path / "larger", hidden=64))
    read = read_experts([str(tiny.save_expert(tmp_path / "x.safetensors", larger, 1))])
    strict = parse_args({"adapt": "expert", "transfer": "strict"})
    with pytest.raises(ExpertMismatchError, match=r"has rank 64 for .*, tiny has 32"):
        prepare_experts(strict, read, tiny_engine.base, tiny_engine.ranks())


def test_layers_leave_the_others_alone(experts: str, tiny_engine: TransformersEngine) -> None:
    settings = parse_args({"adapt": "cem", "layers": "1"})
    kept = prepare_experts(settings, read_experts(["alpha"]), tiny_engine.base, tiny_engine.ranks())[0]
    assert kept.z
    assert all(".layers.1." in name for name in kept.z)
    with pytest.raises(ArgumentError, match="the model has no layer 7, its layers are 0 to 1"):
        prepare_experts(parse_args({"adapt": "cem", "layers": "0+7"}), [kept], tiny_engine.base, tiny_engine.ranks())


def test_a_control_keeps_the_values_and_loses_their_places(experts: str, tiny_engine: TransformersEngine) -> None:
    read = read_experts(["alpha"])
    shuffled = prepare_experts(
        parse_args({"adapt": "mix", "control": "shuffle", "control_seed": 3}),
        read,
        tiny_engine.base,
        tiny_engine.ranks(),
    )[0]
    name = next(iter(read[0].z))
    assert torch.equal(shuffled.z[name].sort().values, read[0].z[name].sort().values)
    assert not torch.equal(shuffled.z[name], read[0].z[name])
    assert shuffled.digest == read[0].digest
