"""What lm-eval wrote is read as it is, and what is not whole is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import sha256, sha256_file
from t2.core.errors import ResultsError
from t2.core.results import TaskResult, find_results, from_lm_eval, read_results, samples_bytes
from tests.results import NAMES, Evaluated, change_json, change_lines


def by_task(folder: Path) -> dict[str, TaskResult]:
    return {result.run.task: result for result in read_results(folder)}


@pytest.fixture
def copied(evaluated: Evaluated, tmp_path: Path) -> Path:
    """Results of the plain model that a test may damage."""
    return Path(shutil.copytree(evaluated.hf, tmp_path / "hf"))


def test_every_task_is_read_with_what_lm_eval_said_of_it(evaluated: Evaluated) -> None:
    (file,) = find_results(evaluated.hf)
    said = json.loads(file.read_text())
    found = by_task(evaluated.hf)
    assert tuple(found) == NAMES
    for task, result in found.items():
        run = result.run
        assert (run.task_version, run.n_shot, run.docs, len(result.samples)) == ("1.0", 0, 12, 12)
        assert {f"{score.key}": score.score for score in run.scores} == {
            key: value for key, value in said["results"][task].items() if "," in key and "_stderr" not in key
        }
        assert all(score.higher_is_better is said["higher_is_better"][task][score.metric] for score in run.scores)
        assert (run.model, run.strategy, run.experts, run.record) == ("hf", "none", (), None)
        assert (run.base.id, run.base.fingerprint) == (Path(said["model_name"]).name, None)
        assert (run.dtype, run.seeds["fewshot"], run.versions["lm_eval"]) == ("float32", 1234, "0.4.13")
        assert run.evaluated_at is not None
        assert run.samples_digest == sha256(samples_bytes(result.samples))
    choice, rolling = found["tiny_choice"], found["tiny_rolling"]
    assert [score.key for score in choice.run.scores] == ["acc,none", "acc_norm,none"]
    assert sum(choice.values(choice.run.score())) / 12 == choice.run.score("acc").score
    assert choice.run.score().stderr == said["results"]["tiny_choice"]["acc_stderr,none"]
    assert [score.aggregation for score in choice.run.scores] == ["mean", "mean"]
    assert rolling.run.score().aggregation == "other"
    assert rolling.values(rolling.run.score()) == []
    with pytest.raises(ResultsError, match="no score f1,\\*; it has: acc,none"):
        choice.run.score("f1")


def test_a_run_of_t2_tells_its_experts_and_its_record(evaluated: Evaluated) -> None:
    digests = {path.stem: sha256_file(path) for path in evaluated.experts.glob("*.safetensors")}
    one, mixed, plain = (
        by_task(folder)["tiny_choice"].run for folder in (evaluated.expert, evaluated.mixed, evaluated.hf)
    )
    assert [(expert.name, expert.digest) for expert in one.experts] == [("alpha", digests["alpha"])]
    assert {expert.name: expert.digest for expert in mixed.experts} == digests
    assert (one.model, one.strategy, mixed.strategy, mixed.seeds["adapt"]) == ("t2", "expert", "cem", 7)
    assert one.base.fingerprint == mixed.base.fingerprint is not None
    assert mixed.record is not None
    assert (mixed.record.task, mixed.record.task_version) == (mixed.task, mixed.task_version)
    assert mixed.settings["population"] == 3
    assert one.docs_digest == mixed.docs_digest == plain.docs_digest
    assert one.prompts_digest == plain.prompts_digest
    assert one.base.id == plain.base.id
    assert len({run.digest() for run in (one, mixed, plain)}) == 3


def test_the_digest_is_of_what_was_measured(evaluated: Evaluated, copied: Path) -> None:
    before = by_task(evaluated.hf)["tiny_choice"].run

    def later(value: dict[str, Any]) -> None:
        value["date"] += 1e6
        value["lm_eval_version"] = "0.4.14"
        value["config"]["model_args"] += ",batch_size=4"
        value["results"]["tiny_choice"]["acc_stderr,none"] = "N/A"

    change_json(copied, later)
    run = by_task(copied)["tiny_choice"].run
    assert run.evaluated_at != before.evaluated_at
    assert run.score().stderr is None
    assert run.digest() == before.digest()
    change_json(copied, lambda value: value["config"].update(fewshot_seed=5))
    assert by_task(copied)["tiny_choice"].run.digest() != before.digest()


def test_the_order_of_samples_does_not_matter(evaluated: Evaluated, copied: Path) -> None:
    change_lines(copied, "tiny_text", lambda samples: samples.reverse())
    change_json(copied, lambda value: value.pop("task_hashes"))
    assert by_task(copied)["tiny_text"].run.samples_digest == by_task(evaluated.hf)["tiny_text"].run.samples_digest


def test_another_filter_is_another_score_of_the_same_documents(copied: Path) -> None:
    def filtered(samples: list[dict[str, Any]]) -> None:
        samples += [{**sample, "filter": "strict", "vowel": 1.0} for sample in samples]

    change_lines(copied, "tiny_text", filtered)
    change_json(copied, lambda value: value.pop("task_hashes"))
    change_json(copied, lambda value: value["results"]["tiny_text"].update({"vowel,strict": 1.0}))
    result = by_task(copied)["tiny_text"]
    assert [score.key for score in result.run.scores] == ["vowel,none", "vowel,strict"]
    assert (result.run.docs, result.values(result.run.score(filter="strict"))) == (12, [1.0] * 12)


def test_a_document_that_the_data_set_repeats_is_read_as_often_as_it_was_scored(copied: Path) -> None:
    def repeat(samples: list[dict[str, Any]]) -> None:
        samples += [{**samples[3], "doc_id": 12}, {**samples[3], "doc_id": 13, "prompt_hash": "0" * 64}]

    change_lines(copied, "tiny_choice", repeat)
    mean = sum(json.loads(line)["acc"] for line in samples(copied).read_text().splitlines()) / 14
    norm = sum(json.loads(line)["acc_norm"] for line in samples(copied).read_text().splitlines()) / 14

    def state(value: dict[str, Any]) -> None:
        value.pop("task_hashes")
        value["results"]["tiny_choice"].update({"acc,none": mean, "acc_norm,none": norm})
        value["n-samples"]["tiny_choice"]["effective"] = 14

    change_json(copied, state)
    result = by_task(copied)["tiny_choice"]
    assert (result.run.docs, result.run.score().n) == (14, 14)
    assert result.run.score().score == pytest.approx(mean)
    assert sorted(map(len, result.by_document(result.run.score()).values())) == [1] * 11 + [3]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def results(folder: Path) -> Path:
    return find_results(folder)[0]


def samples(folder: Path) -> Path:
    (file,) = folder.rglob("samples_tiny_choice_*")
    return file


Damage = Callable[[Path], object]
DAMAGES: list[tuple[str, Damage, str]] = [
    ("nothing", lambda folder: shutil.rmtree(folder), "is not there; give the folder"),
    ("empty", lambda folder: results(folder).unlink(), "holds no results_"),
    ("cut results", lambda folder: cut(results(folder)), "is cut, or no JSON"),
    ("other JSON", lambda folder: results(folder).write_text('{"results": {}}'), "is no results file of lm-eval"),
    ("a list", lambda folder: results(folder).write_text("[]"), "is no results file of lm-eval"),
    ("no samples", lambda folder: samples(folder).unlink(), "run lm_eval with --log_samples"),
    ("emptied samples", lambda folder: samples(folder).write_text(""), "it has no samples"),
    ("cut samples", lambda folder: cut(samples(folder)), "line 12 is cut, or no JSON"),
    (
        "a sample twice",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines.append(lines[3])),
        "appears twice with doc_id 3, again as sample 13",
    ),
    (
        "no hash",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines[4].pop("prompt_hash")),
        "sample 5 has no prompt_hash",
    ),
    (
        "no sample of lm-eval's",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines[0].pop("filter")),
        "sample 1 is none of lm-eval's",
    ),
    (
        "a sample less",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines.pop()),
        "not those of its results, by lm-eval's task hash",
    ),
    (
        "another score",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines[0].update(acc=1 - lines[0]["acc"])),
        r"acc,none is stated as 0.\d+, and its samples have the mean 0.\d+",
    ),
    (
        "no score",
        lambda folder: change_lines(folder, "tiny_choice", lambda lines: lines[0].update(acc="yes")),
        "1 of its 12 samples have no number",
    ),
    (
        "two prompts",
        lambda folder: change_lines(
            folder,
            "tiny_choice",
            lambda lines: lines.append({**lines[0], "filter": "strict", "prompt_hash": "0" * 64}),
        ),
        "has another prompt under strict",
    ),
    (
        "no version",
        lambda folder: change_json(folder, lambda value: value["versions"].pop("tiny_choice")),
        "'tiny_choice' is missing",
    ),
    (
        "a strange expert",
        lambda folder: change_json(
            folder,
            lambda value: value["config"].update(
                t2={"base": {"id": "x"}, "dtype": "", "experts": [{"name": "a", "digest": "b"}]}
            ),
        ),
        "experts: each has the SHA-256",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_what_is_not_whole_is_refused_in_one_line(copied: Path, damage: Damage, message: str) -> None:
    damage(copied)
    with pytest.raises(ResultsError, match=message) as caught:
        read_results(copied)
    assert len(str(caught.value).splitlines()) == 1


def test_several_results_are_told_apart(copied: Path, evaluated: Evaluated) -> None:
    shutil.copytree(evaluated.expert, copied, dirs_exist_ok=True)
    found = find_results(copied)
    assert len(found) == 2
    with pytest.raises(ResultsError, match="holds 2 results; name one of them"):
        read_results(copied)
    assert {read_results(file)[0].run.model for file in found} == {"hf", "t2"}


def test_what_lm_eval_returns_is_what_it_writes(evaluated: Evaluated) -> None:
    (file,) = find_results(evaluated.hf)
    value = json.loads(file.read_text())
    (lines,) = (path.read_text().splitlines() for path in evaluated.hf.rglob("samples_tiny_text_*"))
    logged = [json.loads(line) for line in lines]
    for sample in logged:  # as it is before lm-eval makes text of the answers
        sample["filtered_resps"] = tuple(sample["filtered_resps"])
    assert from_lm_eval(value, "tiny_text", logged, "here") == by_task(evaluated.hf)["tiny_text"]
