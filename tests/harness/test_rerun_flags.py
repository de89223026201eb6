"""Results are repeated with every flag that they hold, and refused in one line where they lack one."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from lm_eval import evaluator
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from t2.core.errors import ArgumentError, DataError, ModelError, T2Error, TaskError
from t2.harness import discovery, flags
from t2.harness.model import T2LM
from t2.harness.rerun import find_results, read_stored, rerun
from tests.harness import tiny


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task definitions: of choices, of texts, one that pins its few-shot examples, and a group."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, count, start in (("test", 12, 0), ("validation", 30, 100)):
        rows = tiny.questions(count, start)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {split: str(folder / f"{split}.jsonl") for split in ("test", "validation")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "test_split": "test",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "doc_to_text": "Q: {{q}}\nA:",
        "metadata": {"version": 1.0},
    }
    choice: dict[str, Any] = {
        **common,
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    text: dict[str, Any] = {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, config in {
        "yaml_choice": choice,
        "yaml_text": text,
        "yaml_pinned": {**choice, "num_fewshot": 0},
        "yaml_two_shots": {**text, "num_fewshot": 2},
    }.items():
        write_task(folder, name, config)
    members = [{"task": "yaml_choice", "description": "Choose well. "}, "yaml_text"]
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "yaml_group", "task": members}))
    return folder


def write_task(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))


def run_lm_eval(
    output: Path,
    tasks: Path,
    names: list[str],
    model: str,
    model_args: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    **given: Any,
) -> Path:
    """Write results as lm-eval does with ``--output_path`` and ``--log_samples``; return their file."""
    discovery.install()
    tracker = EvaluationTracker(output_path=str(output))
    manager = TaskManager(include_path=str(tasks), include_defaults=False, metadata={**model_args, **(metadata or {})})
    defaults: dict[str, Any] = {"bootstrap_iters": 0, "device": "cpu", "fewshot_as_multiturn": None}
    results: Any = evaluator.simple_evaluate(
        model,
        model_args=dict(model_args),
        tasks=list(names),
        task_manager=manager,
        evaluation_tracker=tracker,
        **{**defaults, **given},
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    (path,) = find_results([output])
    return path


def repeat(path: Path, tasks: Path) -> dict[str, tuple[int, bool]]:
    return {one.task: (one.of, one.same) for one in rerun([read_stored(path, include_path=str(tasks))])}


CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "plain": (["yaml_choice", "yaml_text"], {}),
    "samples": (["yaml_choice", "yaml_text"], {"samples": {"yaml_choice": [1, 4, 9], "yaml_text": [0, 2]}}),
    "samples out of order": (["yaml_choice"], {"samples": {"yaml_choice": [9, 1, 4]}}),
    "samples of one task": (["yaml_choice", "yaml_text"], {"samples": {"yaml_text": [3]}}),
    "limit": (["yaml_choice"], {"limit": 5}),
    "share": (["yaml_choice"], {"limit": 0.5}),
    "one turn": (
        ["yaml_choice", "yaml_text"],
        {"apply_chat_template": True, "fewshot_as_multiturn": False, "num_fewshot": 2, "limit": 4},
    ),
    "many turns": (
        ["yaml_text"],
        {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 2, "limit": 4},
    ),
    "shots beside a task that pins none": (["yaml_pinned", "yaml_text"], {"num_fewshot": 3, "limit": 4}),
    "shots that a task pins": (["yaml_two_shots", "yaml_choice"], {"limit": 4}),
    "shots over what a task pins": (["yaml_two_shots", "yaml_pinned"], {"num_fewshot": 1, "limit": 4}),
    "predictions only": (["yaml_choice", "yaml_text"], {"predict_only": True, "limit": 4}),
    "generation arguments": (["yaml_text"], {"gen_kwargs": {"max_gen_toks": 3, "until": ["a", "e"]}, "limit": 6}),
    "generation arguments as text": (["yaml_text"], {"gen_kwargs": "max_gen_toks=3", "limit": 6}),
    "system instruction": (["yaml_text"], {"system_instruction": "Be\nbrief.", "limit": 4}),
    "seeds": (["yaml_choice"], {"num_fewshot": 2, "fewshot_random_seed": 7, "random_seed": None, "limit": 6}),
    "batch size": (["yaml_choice"], {"batch_size": "auto", "limit": 6}),
    "a group": (["yaml_group"], {"limit": 4}),
}


@pytest.mark.parametrize("model", ["hf", "t2"])
@pytest.mark.parametrize("case", CASES)
def test_every_flag_that_results_hold_is_repeated(
    case: str, model: str, tiny_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    names, given = CASES[case]
    path = run_lm_eval(tmp_path / "out", tasks, names, model, {"pretrained": str(tiny_folder)}, **given)
    of = {task: len(file.read_text().splitlines()) for task, file in read_stored(path).samples.items()}
    assert repeat(path, tasks) == {task: (count, True) for task, count in of.items()}


def test_results_in_a_file_of_another_name_and_arguments_as_text_are_repeated(
    tiny_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    discovery.install()
    path = run_lm_eval(tmp_path / "out", tasks, ["yaml_choice"], "hf", {"pretrained": str(tiny_folder)}, limit=3)
    content = json.loads(path.read_text())
    content["config"]["model_args"] = f"pretrained={tiny_folder}"
    renamed = path.with_name(path.name.replace("results_", "mine_"))
    renamed.write_text(json.dumps(content))
    assert repeat(renamed, tasks) == {"yaml_choice": (3, True)}


def test_names_in_arguments_as_text_are_read_as_the_run_read_them(
    tiny_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    path = run_lm_eval(tmp_path / "out", tasks, ["yaml_choice"], "t2", {"pretrained": str(tiny_folder)}, limit=2)
    content = json.loads(path.read_text())
    text = f"pretrained={tiny_folder},revision=007,adapt=none"
    lm = T2LM.create_from_arg_string(text, {"device": "cpu"})
    content["config"] |= {"model_args": text, "t2": json.loads(json.dumps(lm.identity()))}
    path.write_text(json.dumps(content))
    assert read_stored(path).model_args["revision"] == "007"
    assert repeat(path, tasks) == {"yaml_choice": (2, True)}


def test_metadata_of_the_run_reach_the_task_again(tiny_folder: Path, tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "made.py").write_text(
        "import datasets\n"
        "def load(length=1, **_):\n"
        "    return {'test': datasets.Dataset.from_list([{'q': 'x' * length, 'gold': 0}])}\n"
    )
    (folder / "made.yaml").write_text(
        "task: yaml_made\ncustom_dataset: !function made.load\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["a", "b"]\ndoc_to_target: gold\nmetadata: {version: 1.0}\n'
    )
    path = run_lm_eval(
        tmp_path / "out", folder, ["yaml_made"], "hf", {"pretrained": str(tiny_folder)}, metadata={"length": 5}
    )
    assert json.loads(path.with_name(path.name.replace("results", "samples_yaml_made") + "l").read_text())["doc"] == {
        "q": "xxxxx",
        "gold": 0,
    }
    assert repeat(path, folder) == {"yaml_made": (1, True)}


def test_a_template_is_selected_by_its_name_again(tiny_folder: Path, tasks: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(named)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHAT, "short": tiny.CHAT.replace("</>", "")}
    tokenizer.save_pretrained(named)
    given: dict[str, Any] = {"apply_chat_template": "short", "fewshot_as_multiturn": True, "limit": 2}
    path = run_lm_eval(tmp_path / "out", tasks, ["yaml_text"], "hf", {"pretrained": str(named)}, **given)
    assert repeat(path, tasks) == {"yaml_text": (2, True)}

    tokenizer.chat_template = tiny.CHAT.replace("assistant", "model")
    for file in ("chat_template.jinja", "additional_chat_templates/short.jinja"):
        (named / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(named)
    with pytest.raises(ArgumentError, match="the tokenizer no longer has its chat template"):
        repeat(path, tasks)


def test_what_results_do_not_hold_is_refused_in_one_line(tiny_folder: Path, tasks: Path, tmp_path: Path) -> None:
    args = {"pretrained": str(tiny_folder)}
    path = run_lm_eval(tmp_path / "out", tasks, ["yaml_choice"], "hf", args, samples={"yaml_choice": [3, 3, 5]})
    refused(path, tasks, DataError, "--samples named a document of yaml_choice twice")
    for file in tmp_path.rglob("*.json*"):
        file.unlink()
    path = run_lm_eval(tmp_path / "out", tasks, ["yaml_choice"], "hf", args, limit=2)
    good = json.loads(path.read_text())

    changes: list[tuple[dict[str, Any], type[T2Error], str]] = [
        ({"config": {**good["config"], "model": "local-completions"}}, DataError, "its model was local-completions"),
        ({"config": {**good["config"], "model": "t2"}}, DataError, "its model was t2"),
        ({"config": {**good["config"], "model_dtype": "torch.int8"}}, ArgumentError, "its model_dtype was torch.int8"),
        ({"config": {**good["config"], "model_args": {"pretrained": "/none"}}}, ModelError, "cannot load"),
        ({"config": {**good["config"], "model_args": {**args, "wrong": 1}}}, ModelError, "cannot load"),
        ({"n-samples": []}, DataError, "does not hold"),
        ({"n-samples": {}}, DataError, "does not hold"),
    ]
    for change, kind, message in changes:
        path.write_text(json.dumps({**good, **change}))
        refused(path, tasks, kind, message)
    for name in ("system_instruction", "chat_template", "fewshot_as_multiturn", "n-samples"):
        path.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        refused(path, tasks, DataError, f"does not hold .*{name}")
    for name in ("limit", "gen_kwargs", "fewshot_seed", "batch_size"):
        config = {key: value for key, value in good["config"].items() if key != name}
        path.write_text(json.dumps({**good, "config": config}))
        refused(path, tasks, DataError, f"does not hold '{name}'")

    path.write_text(json.dumps(good))
    with pytest.raises(TaskError, match=r"yaml_choice does not exist.*; it came from .*yaml_choice.yaml; name the"):
        list(rerun([read_stored(path)]))
    other = tmp_path / "other"
    other.mkdir()
    config = yaml.safe_load((tasks / "yaml_choice.yaml").read_text())
    write_task(other, "yaml_choice", {**config, "doc_to_text": "Question: {{q}}\nA:"})
    refused(path, other, TaskError, "doc_to_text of task yaml_choice was 'Q: .*' and is 'Question: ")
    write_task(other, "yaml_choice", {**config, "metadata": {"version": 2.0}})
    refused(path, other, TaskError, "task yaml_choice had the version 1.0 and has 2.0")
    write_task(other, "yaml_choice", {**config, "unsafe_code": True})
    refused(path, other, ArgumentError, "agree with --confirm-run-unsafe-code")


def refused(path: Path, tasks: Path, kind: type[T2Error], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        repeat(path, tasks)
    assert "\n" not in str(caught.value)


def test_every_argument_and_option_of_lm_eval_is_classified_once() -> None:
    groups = (flags.HELD, flags.PER_TASK, flags.FROM_USER, flags.NO_EFFECT)
    classified = [name for group in groups for name in group]
    assert len(set(classified)) == len(classified)
    arguments = set(inspect.signature(evaluator.simple_evaluate).parameters)
    options = {field.name for field in dataclasses.fields(EvaluatorConfig)}
    assert set(classified) == arguments | options
    assert set(flags.HELD) <= arguments
