"""What may be imported from ``t2.api``, with signatures: a change of these breaks notebooks."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

import t2.api
from tests.environments import REPOSITORY

NAMES = [
    "AdaptationRecord",
    "Adapted",
    "ChoiceExample",
    "Example",
    "Expert",
    "Model",
    "SavedExpert",
    "T2Error",
    "TrainConfig",
    "TrainResult",
    "load_model",
    "make_config",
    "mix",
    "read_records",
    "train",
]

GENERATE = "(self, prompts, *, max_new_tokens=128, stop=(), chat=False, system=None, seed=0, **generate_kwargs)"
LOGLIKELIHOODS = "(self, prompt, choices, *, chat=False, system=None)"
SIGNATURES = {
    "load_model": "(pretrained=None, *, batch=None, moe='refuse', **hf_args)",
    "make_config": "(where=None, **values)",
    "mix": "(name, experts, alpha=None, *, space='paper', normalise='none', rescale='none', layers=None, rank=None, "
    "transfer='none', model=None, domain=None, folder=None, overwrite=False)",
    "read_records": "(path)",
    "train": "(config, *, folder=None, overwrite=False, continue_=False, checkpoint_every=5, include_path=None, "
    "trackers=(), tracker_dir=None, checkpointing='auto', rollouts=None, lm=None, task=None, progress=True)",
    "Model.adapt": "(self, strategy=None, *, examples=None, prompts=None, task=None, experts=None, score=None, "
    "stop=None, max_new_tokens=None, chat=False, system=None, num_fewshot=None, include_path=None, **options)",
    "Model.experts": "(self)",
    "Model.extract": "(self, tuned, name, *, tuned_args=None, domain=None, task=None, tolerance=0.05, folder=None, "
    "overwrite=False)",
    "Model.generate": GENERATE,
    "Model.import_public": "(self, file, name, *, domain=None, task=None, max_mult=1.0, folder=None, overwrite=False)",
    "Model.loglikelihoods": LOGLIKELIHOODS,
    "Adapted.alpha": "(self, prompt=None)",
    "Adapted.generate": GENERATE,
    "Adapted.loglikelihoods": LOGLIKELIHOODS,
    "Adapted.merge": "(self, folder, *, prompt=None, overwrite=False)",
    "Adapted.save": "(self, name, *, prompt=None, domain=None, folder=None, overwrite=False)",
    "Adapted.write_record": "(self, path)",
}
ATTRIBUTES = {"Model": {"base", "engine", "lm"}, "Adapted": {"experts", "model", "record"}}
FIELDS = {
    "ChoiceExample": ["prompt", "choices", "label"],
    "Example": ["prompt", "answer"],
    "Expert": ["manifest", "z", "digest", "reference", "reason", "transferred"],
    "SavedExpert": ["path", "digest", "note"],
}


def signature(function: Any) -> str:
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    return str(bare.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def methods(name: str) -> set[str]:
    found = inspect.getmembers(getattr(t2.api, name), inspect.isfunction)
    return {f"{name}.{key}" for key, _ in found if not key.startswith("_")}


def test_the_names_are_these() -> None:
    assert t2.api.__all__ == NAMES
    assert all(hasattr(t2.api, name) for name in NAMES)


@pytest.mark.parametrize("path", sorted(SIGNATURES))
def test_the_signatures_are_these(path: str) -> None:
    found: Any = t2.api
    for part in path.split("."):
        found = getattr(found, part)
    assert signature(found) == SIGNATURES[path]


def test_the_methods_and_attributes_are_these() -> None:
    for name, attributes in ATTRIBUTES.items():
        assert methods(name) == {path for path in SIGNATURES if path.startswith(f"{name}.")}
        source = inspect.getsource(getattr(t2.api, name))
        assert all(f"self.{attribute} = " in source or f"def {attribute}(" in source for attribute in attributes)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_fields_are_these(name: str) -> None:
    assert [field.name for field in dataclasses.fields(getattr(t2.api, name))] == FIELDS[name]


def test_all_of_it_is_documented() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in [*NAMES, *(path.partition(".")[2] for path in SIGNATURES if "." in path)]:
        assert f"`{name}" in page or f".{name}(" in page, name
    for path in SIGNATURES:
        found: Any = t2.api
        for part in path.split("."):
            found = getattr(found, part)
        for parameter in inspect.signature(found).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "self":
                named = re.search(rf"`[^`\n]*\b{parameter.name}\b[^`\n]*`", page)
                assert named, f"{path}: {parameter.name}"


def test_everything_public_has_a_docstring() -> None:
    for path in [*NAMES, *SIGNATURES]:
        found: Any = t2.api
        for part in path.split("."):
            found = getattr(found, part)
        assert inspect.getdoc(found), path
