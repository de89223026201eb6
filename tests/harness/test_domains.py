"""The labelled prompts of t2_domains: balanced, of training documents alone, every question once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from t2.adapters.strategies.question import question
from t2.core.digests import doc_hash
from t2.core.errors import DataError
from t2.harness.data import load_rows
from t2.harness.domains import LABELS, read_domains
from t2.harness.overlap import marks_of
from t2.harness.tasks import load_task


def row_of(dataset: str, number: int) -> dict[str, Any]:
    match dataset:
        case "gsm8k":
            return {"question": f"What is {number} plus {number}?", "answer": f"#### {2 * number}"}
        case "math":
            text = f"Find $x$ with $x = {number}^2$."
            return {"problem": text, "level": "Level 1", "type": "Algebra", "solution": f"\\boxed{{{number**2}}}"}
        case "mbpp":
            name = f"add_{number}"
            return {
                "task_id": number,
                "text": f"Write a function to add {number} to a number.",
                "code": f"def {name}(x):\n    return x + {number}",
                "test_setup_code": "",
                "test_list": [f"assert {name}(1) == {number + 1}"],
                "challenge_test_list": [],
            }
        case "hellaswag":
            endings = [f"sits down {i}." for i in range(4)]
            return {"text": f"Walking: Walker {number} takes a step. She", "endings": endings, "label": 1}
        case "boolq":
            return {"passage": f"Town {number} lies at a river.", "question": f"is town {number} dry", "answer": False}
    choices = {"text": ["light", "sound", "heat", "rain"], "label": ["A", "B", "C", "D"]}
    return {"id": str(number), "question": f"What makes leaf {number} green?", "choices": choices, "answerKey": "A"}


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training sets of 60 rows and more, and among them some that are scored or that ask what another one asks."""
    more = {
        "gsm8k": [load_rows("gsm8k", "test")[3]],
        "math": [load_rows("math500", "test")[7]],
        "arc_easy": [{**row_of("arc_easy", 5), "id": "again"}, load_rows("arc_challenge", "test")[11]],
        "hellaswag": [load_rows("hellaswag", "validation")[0]],
        "boolq": [load_rows("boolq", "validation")[0]],
    }
    for dataset in ("gsm8k", "math", "arc_easy", "arc_challenge", "hellaswag", "boolq"):
        # The challenge set asks what the easy one does, in other letters.
        rows = [row_of(dataset, number) for number in range(60 if dataset != "arc_challenge" else 110)]
        write(tmp_path / f"{dataset}_train.jsonl", [*rows, *more.get(dataset, [])])
    write(tmp_path / "mbpp_train.jsonl", [row_of("mbpp", number) for number in range(601, 661)])
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_prompts_are_balanced_distinct_and_of_no_scored_document(made_up: Path) -> None:
    found = read_domains()
    rows = [row for split in found.values() for row in split]
    assert {row["domain"] for row in rows} == set(LABELS)
    for split in found.values():
        assert len(set(Counter(row["domain"] for row in split).values())) == 1
    assert not {doc_hash(row) for row in found["train"]} & {doc_hash(row) for row in found["validation"]}
    assert 3.5 * len(found["validation"]) < len(found["train"]) <= 4 * len(found["validation"])
    texts = [" ".join(row["text"].lower().split()) for row in rows]
    assert len(set(texts)) == len(texts)
    leaked = [load_rows("gsm8k", "test")[3]["question"], load_rows("math500", "test")[7]["problem"]]
    leaked += [load_rows("arc_challenge", "test")[11]["question"], load_rows("hellaswag", "validation")[0]["text"]]
    leaked += [load_rows("boolq", "validation")[0]["passage"]]
    for part in leaked:
        assert not any(part in row["text"] for row in rows), part
    # The easy set's question 5 stands there twice under two ids, and in the challenge set too.
    assert sum("leaf 5 green" in row["text"] for row in rows) <= 1


def test_the_same_documents_give_the_same_prompts_in_any_order(made_up: Path) -> None:
    first = read_domains()
    for path in made_up.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(reversed(lines)))
    assert read_domains() == first


def test_the_task_asks_what_a_dispatch_asks(made_up: Path) -> None:
    task = load_task("t2_domains")
    assert not task.has_test_docs()
    doc = task.validation_docs()[0]
    # A prompt is known by the document that it was made from, too.
    own = marks_of(load_task("t2_gsm8k"), load_task("t2_gsm8k").training_docs())
    assert own & marks_of(task, task.training_docs())
    assert task.doc_to_text(doc) == question(doc["text"], LABELS)
    assert tuple(task.doc_to_choice(doc)) == LABELS
    requests = task.construct_requests(doc=doc, ctx=task.doc_to_text(doc), metadata=("t2_domains", 0, 1))
    assert [request.args[1] for request in requests] == [f" {label}" for label in LABELS]
    for choice in range(4):
        answers = [(-1.0 if i == choice else -9.0, False) for i in range(4)]
        assert task.process_results(doc, answers)["acc"] == float(LABELS[choice] == doc["domain"])


def test_an_absent_training_set_is_told(made_up: Path) -> None:
    (made_up / "gsm8k_train.jsonl").unlink()
    with pytest.raises(DataError, match="no train split of gsm8k"):
        read_domains()
