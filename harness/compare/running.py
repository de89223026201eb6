"""Running a grid: one process, one model, cell after cell; what was done before is found again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from t2.adapters.engine import Engine
from t2.adapters.expert import Expert
from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError
from t2.core.files import atomic_write
from t2.core.record import AdaptationRecord
from t2.harness import compat, store
from t2.harness.answers import Answers
from t2.harness.args import parse_args
from t2.harness.compare.folder import GridFolder, Result
from t2.harness.compare.markdown import markdown
from t2.harness.compare.material import gather
from t2.harness.compare.methods import BASE, Cell
from t2.harness.compare.page import page
from t2.harness.compare.plan import Checked, Request, Taking, check, plan, taking_part
from t2.harness.compare.report import Report, make_report
from t2.harness.evaluating import RunForm, evaluate_tasks, write_results
from t2.harness.model import T2LM
from t2.harness.opened import Opened, open_model

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ran:
    """A grid that is done.

    Attributes:
        cells: in the order of the grid.
        engine: over the base; None where it cannot be adapted.
        experts: of kind expert, that took part.
    """

    cells: tuple[tuple[Cell, Result], ...]
    engine: Engine | None
    experts: tuple[Expert, ...]


def compare(request: Request, output: Path, say: Say = lambda text: None) -> Report:
    """Do what is missing of a comparison, and write the report on it as JSON, Markdown and HTML.

    Raises:
        T2Error: as :func:`run`; or files of the comparison were changed.
    """
    ran = run(request, output, say)
    report = make_report(request, GridFolder(output), ran.cells, gather(ran.engine, ran.experts))
    write_report(report, output)
    return report


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``.

    Raises:
        StorageError: they cannot be written.
    """
    text = json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    for name, content in (("report.json", text + "\n"), ("report.md", markdown(report)), ("report.html", page(report))):
        atomic_write(folder / name, content.encode())


def run(request: Request, output: Path, say: Say = lambda text: None) -> Ran:
    """Do what is missing of a comparison.

    Args:
        request: what to do.
        output: the folder; what lies there of the same settings is not done again.
        say: tells the user a line.

    Raises:
        T2Error: the request cannot be done, or the folder holds something else; mostly before the model is loaded.
    """
    folder = GridFolder(output)
    folder.check(request.common())
    checked = check(request)
    opened = open_model(checked.settings, Answers())
    taking = taking_part(request, checked, opened.base)
    every = plan(request, checked.tasks, taking, opened.base)
    answering = _check_cells(every, request.form, opened)
    folder.begin({**request.common(), **_identity(opened, taking)})
    found = {cell.name: done for cell in every if (done := folder.find(cell)) is not None}
    _check_adapters(every, found, answering, output)
    missing = [cell for cell in every if cell.name not in found]
    say(_told(every, missing, checked))
    progress = _Progress(missing, checked, request, found, say)
    with compat.described_once():
        for cell in missing:
            say(f"{cell} ({progress.place(cell)})")
            start = time.perf_counter()
            found[cell.name] = _evaluate(cell, request.form, checked, opened, folder)
            progress.done(cell, found[cell.name], time.perf_counter() - start)
    return Ran(tuple((cell, found[cell.name]) for cell in every), opened.engine, tuple(taking.experts.values()))


def run_cell(cell: Cell, form: RunForm, checked: Checked, opened: Opened, folder: Path) -> Result:
    """Evaluate one cell and write lm-eval's files into a folder.

    Raises:
        T2Error: it cannot be adapted or scored, or the files cannot be written.
    """
    assert opened.answers is not None
    before = opened.answers.reused
    lm = T2LM.sharing(opened, {**form.base_args(), **cell.args})
    tracker, results = evaluate_tasks(lm, [checked.load(cell.task)], form, cell.args)
    command = form.command(cell.args, cell.task)
    record = _with_seconds(lm.records[0]).model_copy(update={"command": command})
    results["config"]["t2"]["records"] = [record.model_dump(mode="json")]
    aggregated, files = write_results(tracker, results, folder)
    samples = files[cell.task]
    return Result(
        task=cell.task,
        method=cell.method,
        control=cell.control,
        seed=cell.seed,
        model_args=json.loads(json.dumps(dict(cell.args))),
        command=command,
        results=aggregated.name,
        samples=samples.name,
        samples_sha256=sha256_file(samples),
        identity=lm.identity()["digest"],
        record=record,
        record_digest=record.digest(),
        numbers=lm.numbers,
        requests=sum(used.requests for used in record.mixtures),
        reused=opened.answers.reused - before,
    )


def _evaluate(cell: Cell, form: RunForm, checked: Checked, opened: Opened, folder: GridFolder) -> Result:
    result = run_cell(cell, form, checked, opened, folder.clear(cell))
    folder.finish(cell, result)
    return result


def _with_seconds(record: AdaptationRecord) -> AdaptationRecord:
    """The record with the seconds that its adaptation took when it was not found again."""
    stored = store.load(record.key) if record.strategy != "none" else None
    if stored is None or record.timing.pass1:
        return record
    timing = record.timing.model_copy(update={"pass1": stored.record.timing.pass1})
    return record.model_copy(update={"timing": timing})


def _check_cells(cells: Iterable[Cell], form: RunForm, opened: Opened) -> dict[str, str]:
    """Make every model once: experts of another base, without a domain, or of no use are told before any long work.

    Returns:
        Digests of what answers, by the arguments of the cells.
    """
    answering: dict[str, str] = {}
    for cell in cells:
        key = _seedless(cell)
        if key not in answering:
            answering[key] = T2LM.sharing(opened, {**form.base_args(), **cell.args}).identity()["digest"]
    return answering


def _check_adapters(
    cells: Iterable[Cell], found: Mapping[str, Result], answering: Mapping[str, str], output: Path
) -> None:
    """Refuse cells of adapters whose folders hold another one by now; any adapter may join a comparison later.

    Raises:
        ArgumentError: there is one.
    """
    for cell in cells:
        done = found.get(cell.name)
        if done is not None and cell.args["adapt"] == "peft" and done.identity != answering[_seedless(cell)]:
            raise ArgumentError(
                f"--output {output} holds {cell} of another adapter than lies in {cell.args['peft']} now; name another "
                "folder"
            )


def _seedless(cell: Cell) -> str:
    return json.dumps({name: value for name, value in cell.args.items() if not name.endswith("seed")}, default=str)


def _identity(opened: Opened, taking: Taking) -> dict[str, object]:
    experts = [*taking.experts.values(), *([taking.classifier[1]] if taking.classifier else [])]
    return {"base": opened.base.identity, "experts": {expert.name: expert.digest for expert in experts}}


def _told(every: list[Cell], missing: list[Cell], checked: Checked) -> str:
    tasks = ", ".join(f"{name} ({docs} docs)" for name, docs in checked.docs.items())
    known = len(every) - len(missing)
    again = f", of which {known} are found again" if known else ""
    return f"{len(every)} cells on {tasks}{again}"


class _Progress:
    """Tells how far a grid is, and how long the rest may take, by what the base has taken."""

    def __init__(
        self, missing: list[Cell], checked: Checked, request: Request, found: Mapping[str, Result], say: Say
    ) -> None:
        self._missing = missing
        self._checked = checked
        self._request = request
        self._say = say
        self._pace = {done.task: done.record.timing.pass2 for done in found.values() if done.method == BASE}

    def place(self, cell: Cell) -> str:
        return f"{self._missing.index(cell) + 1} of {len(self._missing)}"

    def done(self, cell: Cell, result: Result, seconds: float) -> None:
        score = f"{result.record.timing.pass1:.1f} s + {result.record.timing.pass2:.1f} s"
        self._say(f"{cell}: {score}" + (", answered before" if result.reused == result.requests else ""))
        if cell.method == BASE:
            self._pace[cell.task] = max(seconds, result.record.timing.pass2)
            self._estimate(cell)

    def _estimate(self, after: Cell) -> None:
        """The seconds of the cells of this task: answers as the base's, searches at most as long as they may be."""
        own = [cell for cell in self._missing if cell.task == after.task and cell.method != BASE]
        once = self._pace[after.task]
        per_doc = once / max(1, self._checked.docs[after.task])
        search = 0.0
        for cell in own:
            settings = parse_args({**self._request.form.base_args(), **cell.args})
            if cell.args["adapt"] in ("cem", "auto"):
                most = settings.budget.evaluations or settings.population * settings.generations
                search += settings.budget.seconds or most * settings.shots * per_doc
        text = f"{after.task}: the other {len(own)} cells take about {_seconds(once * len(own))}"
        if search:
            text += f", and their searches at most {_seconds(search)} (mostly far less)"
        if own:
            self._say(text)


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
