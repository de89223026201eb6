from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval.utils import simple_parse_args_string

from t2.core.errors import ArgumentError, DependencyError, T2Error
from t2.harness.args import FROM_PRETRAINED, MODEL_ARGS, check_hf_args, hf_arguments, parse_args, split_args


@pytest.mark.parametrize(
    "text",
    [
        "adapt=cem,experts=math+code,shots=5,elite=0.5,light=true,control=shuffle,control_seed=007,layers=0-3+5",
        "adapt=none,control=none,normalise=none,rescale=none,transfer=none",
        "adapt=mix,experts=a+b,alpha=0.5+-1e-1,space=delta,rank=1e1",
    ],
)
def test_arguments_mean_the_same_as_strings_and_as_lm_eval_parses_them(text: str) -> None:
    raw = dict(part.split("=", 1) for part in text.split(","))
    assert parse_args(simple_parse_args_string(text)) == parse_args(raw)


def test_values_are_read() -> None:
    settings = parse_args({"adapt": "mix", "experts": "a+b", "alpha": "1+0.25", "layers": 3, "record": "r.json"})
    assert settings.experts == ("a", "b")
    assert settings.alpha == (1.0, 0.25)
    assert settings.layers == (3,)
    assert settings.record == Path("r.json")
    assert settings.options().alpha == (1.0, 0.25)


def test_defaults_are_those_of_the_paper() -> None:
    settings = parse_args({})
    assert (settings.adapt, settings.shots, settings.population, settings.generations) == ("none", 10, 32, 100)


def test_light_gives_way_to_what_is_said_explicitly() -> None:
    light = parse_args({"adapt": "cem", "light": True})
    assert (light.shots, light.generations) == (3, 10)
    mixed = parse_args({"adapt": "cem", "light": True, "shots": 7})
    assert (mixed.shots, mixed.generations) == (7, 10)


def test_a_large_seed_is_kept_exactly() -> None:
    assert parse_args({"adapt": "cem", "adapt_seed": 2**60 + 1}).adapt_seed == 2**60 + 1


def test_a_budget_and_a_preselection_are_read_from_either_parser() -> None:
    for given, budget, preselect in (
        ("budget=200,preselect=3", "200", 3),
        ("budget=60s,preselect=none", "60s", None),
        ("budget=5m", "300s", 8),
        ("budget=none", "none", 8),
    ):
        raw = {"adapt": "cem", **dict(part.split("=", 1) for part in given.split(","))}
        for settings in (parse_args(raw), parse_args(simple_parse_args_string(f"adapt=cem,{given}"))):
            assert (str(settings.budget), settings.preselect) == (budget, preselect)
            assert settings.bearing()["budget"] == budget
            assert settings.options().preselect == preselect


@pytest.mark.parametrize("economy", ["none", "exact", "early", "halving"])
def test_an_economy_is_read_from_either_parser_and_exact_by_default(economy: str) -> None:
    assert parse_args({"adapt": "cem"}).economy == "exact"
    for settings in (
        parse_args({"adapt": "cem", "economy": economy}),
        parse_args(simple_parse_args_string(f"adapt=cem,economy={economy}")),
    ):
        assert settings.options().economy == settings.bearing()["economy"] == economy


def test_only_what_has_an_effect_is_part_of_an_adaptation() -> None:
    everywhere = {name for name, spec in MODEL_ARGS.items() if not spec.strategies} - {"record", "batch"}
    assert set(parse_args({}).bearing()) == everywhere >= {"engine", "adapt"}
    fixed = parse_args({"adapt": "mix", "experts": "a+b"}).bearing()
    assert {"space", "normalise", "rescale", "layers", "rank", "control", "alpha"} <= set(fixed)
    assert not {"shots", "search", "population", "budget", "control_seed", "record", "batch"} & set(fixed)
    searched = parse_args({"adapt": "cem", "search": "cma", "control": "shuffle"}).bearing()
    assert {"shots", "search", "budget", "preselect", "control_seed"} <= set(searched)
    assert not {"elite", "alpha", "light"} & set(searched)


def test_what_is_given_as_it_is_by_default_may_stay_under_any_strategy() -> None:
    defaults = {"shots": 10, "population": 32, "elite": 0.2, "search": "cem", "per": "expert", "control": "none"}
    for adapt in ("none", "mix", "prompt", "cem"):
        assert parse_args({"adapt": adapt, **defaults, "budget": "none", "preselect": 8}).adapt == adapt


def test_an_engine_that_is_not_installed_names_its_install_command() -> None:
    with pytest.raises(DependencyError, match=re.escape('engine=vllm needs vLLM: pip install "t2-eval[vllm]"')):
        parse_args({"engine": "vllm", "pretrained": "x", "tensor_parallel_size": 2})


def test_hf_arguments_are_passed_on_and_named_by_its_signature() -> None:
    settings = parse_args({"pretrained": "x", "dtype": "bfloat16", "attn_implementation": "eager"})
    assert settings.hf == {"pretrained": "x", "dtype": "bfloat16", "attn_implementation": "eager"}
    assert {"pretrained", "revision", "gguf_file", "dtype", "batch_size"} <= set(hf_arguments())


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"adpat": "cem"}, "adpat does not exist; did you mean 'adapt'?"),
        ({"pretraned": "x"}, "pretraned does not exist; did you mean 'pretrained'?"),
        ({"adapt": "cme"}, "adapt=cme is not a value of it; did you mean 'cem'?"),
        ({"adapt": "cem", "threshold": 0.5}, "threshold=0.5 has no effect with adapt=cem, it is for adapt=prompt or"),
        ({"adapt": "prompt", "threshold": 1.5}, "threshold=1.5 must be at least 0 and at most 1"),
        ({"adapt": "prompt", "threshold": "high"}, "threshold=high must be a number or calibrate"),
        ({"adapt": "prompt", "dispatch": "generate", "threshold": 0.5}, "no effect with dispatch=generate, it is for"),
        ({"adapt": "prompt", "threshold": 0, "fallback": "base"}, "fallback=base has no effect with threshold=0"),
        ({"engine": "vlm"}, "engine=vlm is not a value of it; did you mean 'vllm'?"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization is for engine=vllm, not for engine=hf; leave it out"),
        ({"adapt": "mix", "transfer": "resampel"}, "transfer=resampel is not a value of it; did you mean 'resample'?"),
        ({"adapt": "peft"}, "adapt=peft needs peft=, the folder of an adapter of PEFT"),
        ({"peft": "x"}, "peft=x has no effect with adapt=none, it is for adapt=peft; leave it out"),
        ({"adapt": "peft", "peft": "x", "experts": "a"}, "experts=a has no effect with adapt=peft"),
        ({"adapt": "peft", "peft": "x", "control": "shuffle"}, "control=shuffle has no effect with adapt=peft"),
        ({"adapt": "peft", "peft": "x", "delta": "y"}, "delta and adapt=peft both change the base model"),
        (
            {"adapt": "peft", "peft": "x", "engine": "hf-multimodal"},
            "adapt=peft is for engine=hf, not for engine=hf-multimodal",
        ),
        ({"workers": 2}, "workers=2 has no effect with adapt=none"),
        ({"adapt": "cem", "workers": 0}, "workers=0 must be at least 1"),
        ({"shots": 0}, "shots=0 must be at least 1"),
        ({"shots": 2.5}, "shots=2.5 must be a whole number"),
        ({"adapt_seed": 10**400}, "must be a whole number"),
        ({"experts": "a"}, "experts=a has no effect with adapt=none, it is for adapt=expert or mix or best or prompt"),
        ({"control": "shuffle"}, "control=shuffle has no effect with adapt=none"),
        ({"layers": "0-99999999999"}, "not of the form 0-15+20"),
        ({"shots": True}, "shots=True must be a whole number"),
        ({"population": "many"}, "population=many must be a whole number"),
        ({"adapt": "cem", "budget": 0}, "budget=0 must be a whole number of evaluations, at least 2"),
        (
            {"adapt": "cem", "budget": "abc"},
            "model_args: budget=abc must be a number of evaluations, such as 200, or a",
        ),
        ({"adapt": "cem", "preselect": 0}, "preselect=0 must be at least 1"),
        ({"adapt": "cem", "preselect": "some"}, "preselect=some must be a whole number"),
        ({"adapt": "auto", "shots": 1}, "adapt=auto judges by docs that nothing was fitted on; give shots=2 or more"),
        ({"adapt": "mix", "population": 12}, "population=12 has no effect with adapt=mix, it is for adapt=cem or auto"),
        ({"adapt": "prompt", "light": True}, "light=True has no effect with adapt=prompt"),
        ({"adapt": "none", "adapt_seed": 3}, "adapt_seed=3 has no effect with adapt=none"),
        ({"adapt": "expert", "experts": "a", "per": "layer"}, "per=layer has no effect with adapt=expert"),
        (
            {"adapt": "cem", "search": "cma", "elite": 0.5},
            "elite=0.5 has no effect with search=cma, it is for search=cem",
        ),
        (
            {"adapt": "mix", "control_seed": 4},
            "control_seed=4 has no effect with control=none, it is for control=shuffle",
        ),
        ({"adapt": "none", "layers": "0-3"}, "layers=0-3 has no effect with adapt=none"),
        ({"elite": 0}, "elite=0 must lie above 0"),
        ({"elite": 1.5}, "elite=1.5 must be at least 0 and at most 1"),
        ({"elite": float("nan")}, "elite=nan must be a number"),
        ({"light": "maybe"}, "light=maybe must be true or false"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"layers": "3-1"}, "runs backwards"),
        ({"layers": "a"}, "not of the form 0-15+20"),
        ({"experts": 7}, "a name starts with a letter"),
        ({"experts": "a++b"}, "must be names joined by +"),
        ({"adapt": "cem", "experts": "a+a"}, "experts names a twice"),
        ({"adapt": "expert", "experts": "a+b"}, "adapt=expert applies one expert"),
        (
            {"adapt": "cem", "experts": "a", "alpha": 1},
            "alpha=1 has no effect with adapt=cem, it is for adapt=mix; leave it out",
        ),
        ({"adapt": "mix", "alpha": "1+1"}, "alpha needs experts="),
        ({"adapt": "mix", "experts": "a+b", "alpha": "1+1+1"}, "3 coefficients for the 2 experts a+b"),
        ({"adapt": "mix", "experts": "a+b", "alpha": "1+x"}, "alpha=x must be a number"),
        ({"record": "."}, "is a folder; name a file"),
    ],
)
def test_a_bad_argument_is_told_in_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_args(given)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"dtpye": "bfloat16"}, "--model-args: dtpye does not exist; did you mean 'dtype'?"),
        ({"adapt": "cem"}, "--model-args: adapt is an argument of lm_eval --model t2"),
    ],
)
def test_arguments_of_the_base_model_alone_are_checked(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_hf_args({"pretrained": "x", "variant": "fp16", **given}, "--model-args")
    assert line in str(caught.value)


def test_every_argument_says_what_it_does_and_none_is_told_twice() -> None:
    assert all(spec.help and len(spec.help) < 120 for spec in MODEL_ARGS.values())
    assert all(spec.default in (None, *spec.values) for spec in MODEL_ARGS.values() if spec.kind == "choice")
    assert not set(MODEL_ARGS) & {*hf_arguments(), *FROM_PRETRAINED}
    assert issubclass(ArgumentError, T2Error)


def test_the_readme_names_every_argument_with_its_values_and_default() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|") for line in readme.splitlines() if line.startswith("| `")]
    for name, spec in MODEL_ARGS.items():
        row = next((cells for cells in rows if f"`{name}`" in cells[1]), None)
        assert row is not None, f"{name} is missing from the README's table"
        told = " ".join(row[2:])
        assert [value for value in spec.values if f"`{value}`" not in told] == []
        if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
            assert f"{spec.default:g}" in row[3]


@pytest.mark.parametrize("name", ["none", "None", "true", "007", "1e5", "1_0"])
def test_names_that_look_like_values_stay_as_they_were_written(name: str) -> None:
    text = f"adapt=cem,metric={name},filter={name},experts={name}+b,registry={name},record={name},revision={name}"
    settings = parse_args(split_args(text))
    assert (settings.metric, settings.filter, settings.experts) == (name, name, (name, "b"))
    assert (settings.registry, settings.record) == (name, Path(name))
    assert settings.hf["revision"] == (name if name.lower() != "none" else None)
    assert parse_args(split_args(f"adapt=expert,experts={name}")).experts == (name,)
    assert split_args("revision='1e5',batch_size=4,dtype=bfloat16") == {
        "revision": "1e5",
        "batch_size": 4,
        "dtype": "bfloat16",
    }


def test_a_filter_called_none_is_meant_by_its_name_and_absent_means_the_first() -> None:
    for given in ({"filter": "none"}, {"filter": None}, split_args("filter=none")):
        assert parse_args({"adapt": "cem", **given}).filter == "none"
    assert parse_args({"adapt": "cem"}).filter is None


@pytest.mark.parametrize("name", ["metric", "filter", "registry", "record", "revision", "pretrained"])
@pytest.mark.parametrize("value", [True, 7, 1e5])
def test_a_name_that_lm_eval_read_as_a_number_is_refused_with_the_quotes_it_needs(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be a text, but lm-eval parsed it as {value}; write it"):
        parse_args({"adapt": "cem", name: value})


def test_none_of_a_number_is_its_default_by_either_parser() -> None:
    text = "adapt=cem,rank=none,workers=none,layers=none,shots=none"
    assert parse_args(split_args(text)) == parse_args(simple_parse_args_string(text)) == parse_args({"adapt": "cem"})
