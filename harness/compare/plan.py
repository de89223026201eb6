"""What a comparison is asked to do, checked as far as that goes without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm_eval.api.task import Task

from t2.adapters.expert import Expert
from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, TaskError
from t2.core.manifest import BaseModelRef
from t2.harness.args import Settings, parse_args
from t2.harness.compare.members import Member, check_names, members_of
from t2.harness.compare.methods import Cell, Method, adapter_rows, cells, check_free, check_used, rows
from t2.harness.defaults import default_classifier, default_experts
from t2.harness.evaluating import RunForm, check_consent
from t2.harness.experts import read_values, value_of
from t2.harness.pool import find_pool
from t2.harness.tasks import TaskSource

_UNNAMED, _UNNAMED_CLASSIFIER = "unnamed", "unnamed-classifier"
"""Stand for experts that are found when the model is loaded."""


@dataclass(frozen=True)
class Request:
    """What a comparison is to do.

    Attributes:
        tasks: names; a group stands for its tasks.
        methods, controls, seeds: as :mod:`t2.harness.compare.methods` reads them.
        experts: names, references, files or folders; None takes the defaults for the base.
        adapters: folders of adapters of PEFT.
        model_args: what all cells have in common.
        form: how lm-eval is run.
        load: loads a task by name; None finds it as lm-eval does.
    """

    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    controls: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (0,)
    experts: tuple[str, ...] | None = None
    adapters: tuple[str, ...] = ()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    form: RunForm = field(default_factory=RunForm)
    load: Callable[[str], Task] | None = None

    def common(self) -> dict[str, Any]:
        """What every cell's number depends on, as JSON: a folder holds one such setting."""
        form = self.form.model_dump(mode="json")
        return {"model_args": dict(self.model_args), **form}


@dataclass(frozen=True)
class Taking:
    """The experts of a comparison.

    Attributes:
        experts: those of kind expert, by the value of ``experts=`` that means each.
        classifier: the same of the classifier; None without one.
    """

    experts: Mapping[str, Expert]
    classifier: tuple[str, Expert] | None = None


@dataclass(frozen=True)
class Checked:
    """A request that can be begun.

    Attributes:
        tasks: their names, groups resolved.
        docs: documents that are scored, by task.
        settings: what loads the base.
        taking: the named experts; None where they are the defaults.
        load: loads a task anew.
    """

    tasks: tuple[str, ...]
    docs: Mapping[str, int]
    settings: Settings
    taking: Taking | None
    load: Callable[[str], Task]


def check(request: Request) -> Checked:
    """Check a request before the model is loaded.

    Raises:
        ArgumentError: methods, seeds, arguments or experts that do not fit each other.
        TaskError: a task is unknown, or has nothing to adapt on.
        T2Error: an expert or adapter cannot be read.
    """
    check_free(request.model_args, "--model-args")
    check_used(request.model_args, request.methods)
    taking = _named(request) if request.experts is not None else None
    if taking is not None and not taking.experts and any(method.takes_experts for method in request.methods):
        raise ArgumentError("--experts names no expert beside the classifier; name those that answer, or leave it out")
    known = [] if taking is None else [expert.name for expert in taking.experts.values()]
    for method in request.methods:
        if known and method.members is not None:
            check_names(method.members, known, method.label)
    named = [Member(_UNNAMED, _UNNAMED)] if taking is None else [Member(value, value) for value in taking.experts]
    # Which experts are of another base is known with the base.
    anyhow = replace(request, methods=tuple(replace(method, members=None) for method in request.methods))
    for cell in _cells(anyhow, ("task",), named, _UNNAMED_CLASSIFIER):
        parse_args({**request.form.base_args(), **cell.args})
    settings = parse_args({**request.form.base_args(), **effective_base(request)})
    source = TaskSource(request.form.include_path, request.model_args)
    load = request.load or source.load
    names = [each for name in request.tasks for each in ((name,) if request.load else source.names(name))]
    if len(set(names)) < len(names):
        raise ArgumentError(f"--tasks names {next(name for name in names if names.count(name) > 1)} twice")
    docs = {name: _check_task(load(name), request) for name in names}
    return Checked(tuple(names), docs, settings, taking, load)


def effective_base(request: Request) -> dict[str, Any]:
    """The model_args of the base's cell."""
    return dict(cells("task", [request.methods[0]], ("none",), (0,), request.model_args)[0].args)


def plan(request: Request, tasks: Sequence[str], taking: Taking, base: BaseModelRef) -> list[Cell]:
    """The cells of a request, the base of each task first.

    Raises:
        ArgumentError: a method names experts that do not take part.
    """
    classifier = taking.classifier[0] if taking.classifier else None
    return _cells(request, tasks, members_of(taking.experts, base), classifier)


def _cells(request: Request, tasks: Sequence[str], named: Sequence[Member], classifier: str | None) -> list[Cell]:
    methods = rows(request.methods, named, classifier)
    methods += adapter_rows(request.adapters)
    return [
        cell for task in tasks for cell in cells(task, methods, request.controls, request.seeds, request.model_args)
    ]


def taking_part(request: Request, checked: Checked, base: BaseModelRef) -> Taking:
    """The experts of a request, once the base is known.

    Raises:
        ArgumentError: there are none for it.
    """
    where = checked.settings.registry
    taking = checked.taking
    wanted = [method for method in request.methods if method.takes_experts]
    if taking is None or (not taking.experts and wanted):
        experts = default_experts(base, where) if wanted else []
        taking = Taking({_value(expert): expert for expert in experts}, taking.classifier if taking else None)
    if taking.classifier is None and any(method.adapt in ("classifier", "auto") for method in wanted):
        found = default_classifier(base, where)
        if found is not None:
            taking = Taking(taking.experts, (_value(found), found))
    return taking


def _named(request: Request) -> Taking:
    assert request.experts is not None
    where = request.model_args.get("registry")
    found = read_values(request.experts, None if where is None else str(where))
    for value, _ in found:
        if "+" in value or "," in value:
            raise ArgumentError(
                f"--experts: {value} has a + or a comma in its path, which model_args cannot say; rename it"
            )
    classifiers = [(value, expert) for value, expert in found if expert.manifest.kind == "classifier"]
    return Taking(
        {value: expert for value, expert in found if expert.manifest.kind != "classifier"},
        classifiers[0] if classifiers else None,
    )


def _check_task(task: Task, request: Request) -> int:
    """The number of documents that are scored."""
    check_consent(task, request.form)
    hashes = [doc_hash(doc) for doc in task.eval_docs]
    if len(set(hashes)) < len(hashes):
        raise TaskError(
            f"task {task.task_name} has a document twice, and documents are paired by their content; leave the task out"
        )
    pool = find_pool(task)
    if any(method.draws for method in request.methods):
        if pool.absent is not None:
            raise pool.absent
        if not pool.docs:
            drawing = ", ".join(method.label for method in request.methods if method.draws)
            raise TaskError(f"task {task.task_name} has no docs to adapt on; leave {drawing} out with --methods")
    count = len(task.eval_docs) if pool.kept is None else len(pool.kept)
    limit = request.form.limit
    return count if limit is None else min(count, int(limit) if limit >= 1 else max(1, int(count * limit)))


def _value(expert: Expert) -> str:
    value = value_of(expert)
    assert value is not None
    return value
