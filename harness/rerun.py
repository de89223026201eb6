"""Results of lm-eval repeated from what they hold, and compared sample for sample."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.registry
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable, simple_parse_args_string

from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, DataError, ModelError, T2Error, TaskError
from t2.core.settings import cache_dir
from t2.harness import compat
from t2.harness.args import parse_args, split_args
from t2.harness.evaluating import RunForm, call_lm_eval, check_consent, write_results
from t2.harness.flags import HELD, RunResults
from t2.harness.model import T2LM
from t2.harness.opened import Opened, open_model
from t2.harness.tasks import TaskSource

_KEPT = ("bases", "digests", "experts")
"""Of the cache what a rerun may use: none of it holds an adaptation or an answer."""
_HF = ("hf", "hf-auto", "huggingface", "hf-multimodal")
"""lm-eval's own models that a rerun loads by their model_args, beside ``t2``."""
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?$")
_PROMPT_FIELDS = (
    "dataset_path",
    "dataset_name",
    "test_split",
    "validation_split",
    "fewshot_split",
    "output_type",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "description",
    "target_delimiter",
    "fewshot_delimiter",
    "gen_prefix",
    "repeats",
)
"""Fields of a task's configuration that make its samples and that no flag changes."""


@dataclass(frozen=True)
class Stored:
    """Results on disk, and all that repeating them takes.

    Attributes:
        path: the file of lm-eval's results.
        model: lm-eval's name of the model.
        tasks: in their order.
        samples: the file of the samples of each task.
        model_args: of the model.
        metadata: the model's arguments as lm-eval hands them to the tasks.
        flags: arguments of ``simple_evaluate``, but for the chat template and those of each task.
        chat_template: the text of the chat template; None where none was applied.
        configs: the configuration of each task as it was run.
        groups: the tasks and groups in each group.
        include_path: a folder of further tasks.
        info: what the model said of itself.
    """

    path: Path
    model: str
    tasks: tuple[str, ...]
    samples: Mapping[str, Path]
    model_args: Mapping[str, Any]
    metadata: Mapping[str, Any]
    flags: Mapping[str, Any]
    chat_template: str | None
    configs: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Sequence[str]]
    include_path: str | None
    info: Mapping[str, Any]

    def given_args(self) -> dict[str, Any]:
        """The model's arguments with those that lm-eval's command line hands over beside them."""
        beside = {name: self.flags[name] for name in ("batch_size", "device") if self.flags[name] is not None}
        return {**beside, **self.model_args}


@dataclass(frozen=True)
class Repeated:
    """One task of results that were repeated.

    Attributes:
        path: the file of the results.
        task: the task.
        before, after: digests of the samples.
        differing: samples that differ.
        of: how many there are.
    """

    path: Path
    task: str
    before: str
    after: str
    differing: int
    of: int

    @property
    def same(self) -> bool:
        """Whether all samples are the same, byte for byte."""
        return self.before == self.after


def find_results(paths: Sequence[Path]) -> list[Path]:
    """lm-eval's files of results under some paths.

    Raises:
        ArgumentError: a path is none, or a folder without any.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("results_*.json")) if path.is_dir() else [path] if path.is_file() else []
        if not inside:
            raise ArgumentError(
                f"{path} is no file of results and no folder with results_*.json; name what lm-eval wrote"
            )
        found += inside
    return list(dict.fromkeys(found))


def read_stored(path: Path, *, include_path: str | None = None, confirm_run_unsafe_code: bool = False) -> Stored:
    """Read results of ``lm_eval --model t2`` or ``hf`` with ``--log_samples``, or of a cell of a comparison.

    Args:
        path: the file of the results.
        include_path: a folder of further tasks, which results do not tell.
        confirm_run_unsafe_code: run what the model writes, where a task does.

    Raises:
        DataError: they are damaged, of another model, without samples, or do not hold how they were run.
    """
    try:
        content = json.loads(path.read_bytes())
        config = content["config"]
        tasks, model = tuple(content["n-samples"].keys()), str(config["model"])
        args = config["model_args"] or {}
        if not tasks:
            raise ValueError("no tasks")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not hold results of lm_eval ({error!r}); name such a file") from error
    if model not in ("t2", *_HF) or (model == "t2" and "t2" not in config):
        raise DataError(f"{path} cannot be repeated: its model was {model[:200]}; t2 rerun repeats t2 and hf")
    found = _DATE.search(path.stem)
    date = found[0] if found is not None else path.stem.removeprefix("results_")
    samples = {task: path.with_name(f"samples_{task}_{date}.jsonl") for task in tasks}
    for file in samples.values():
        if not file.is_file():
            raise DataError(f"{path} has no samples beside it ({file.name}); run with --log_samples")
    results = RunResults(content, {task: _doc_ids(file) for task, file in samples.items()})
    flags: dict[str, Any] = {"confirm_run_unsafe_code": confirm_run_unsafe_code}
    try:
        for name, read in HELD.items():
            flags[name] = read(results)
        chat_template, groups = content["chat_template"], content.get("group_subtasks") or {}
        configs = {task: content["configs"][task] for task in tasks}
        parse = split_args if model == "t2" else simple_parse_args_string
        given = dict(parse(args) if isinstance(args, str) else args)
        metadata = dict(simple_parse_args_string(args) if isinstance(args, str) else args)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be repeated: it does not hold {error}; name results that lm_eval --output_path wrote"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} cannot be repeated: {error}") from error
    return Stored(
        path, model, tasks, samples, given, metadata, flags, chat_template, configs, groups, include_path, info=config
    )


def rerun(
    stored: Sequence[Stored],
    load: Callable[[str], Task] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Repeated]:
    """Repeat results without anything that an earlier adaptation left in the cache, and compare the samples.

    Args:
        stored: the results.
        load: loads a task by name; None finds it as lm-eval does.
        say: tells the user a line.

    Raises:
        T2Error: a model, expert or task is no longer what it was, or cannot be had.
    """
    opened: Opened | None = None
    with _fresh_cache(), compat.described_once():
        for number, one in enumerate(stored, start=1):
            if one.model == "t2":
                args = {name: value for name, value in one.given_args().items() if name != "record"}
                settings = parse_args(args)
                if opened is None or not opened.serves(settings):
                    opened = open_model(settings)
                lm: LM = T2LM.sharing(opened, args)
                _check_identity(one, lm.identity())
            else:
                lm = _load_hf(one)
            flags = {**one.flags, "apply_chat_template": _chat_template_argument(one, lm)}
            say(f"{one.path} ({number} of {len(stored)})")
            tasks = _load_tasks(one, load)
            with tempfile.TemporaryDirectory(prefix="t2-rerun-") as folder:
                tracker, results = call_lm_eval(lm, tasks, flags, one.model_args, one.model)
                _, files = write_results(tracker, results, Path(folder))
                for task in one.tasks:
                    yield _compare(one, task, files[task])


def _doc_ids(samples: Path) -> list[int]:
    """Numbers of the documents in the order of their samples; a further filter repeats them, and counts once."""
    ids: list[int] = []
    first: Any = None
    try:
        with samples.open("rb") as file:
            for line in filter(bytes.strip, file):
                sample = json.loads(line)
                first = sample["filter"] if not ids else first
                if sample["filter"] == first:
                    ids.append(sample["doc_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{samples} does not hold samples of lm_eval ({error!r}); run with --log_samples") from error
    return ids


def _load_hf(one: Stored) -> LM:
    """lm-eval's own model, from the arguments that made it then."""
    try:
        lm: LM = lm_eval.api.registry.get_model(one.model).create_from_arg_obj(dict(one.given_args()))
    except T2Error:
        raise
    except Exception as error:  # a model's libraries may raise anything
        raise ModelError(
            f"{one.path} cannot be repeated: lm-eval's {one.model} cannot load {dict(one.model_args)}: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    now = _as_json(lm.get_model_info())
    for name in ("model_num_parameters", "model_dtype"):
        if name in one.info and one.info[name] != now.get(name):
            raise ArgumentError(
                f"{one.path} cannot be repeated: its {name} was {one.info[name]} and is {now.get(name)}"
            )
    return lm


def _chat_template_argument(one: Stored, lm: LM) -> bool | str:
    """The value of ``apply_chat_template`` that selects the stored template."""
    if one.chat_template is None:
        return False
    known = getattr(getattr(lm, "tokenizer", None), "chat_template", None)
    choices: list[bool | str] = [True, *(known if isinstance(known, dict) else ())]
    for choice in choices:
        with contextlib.suppress(ValueError):  # templates with names, and none is the default
            if lm.chat_template(choice) == one.chat_template:
                return choice
    raise ArgumentError(
        f"{one.path} cannot be repeated: the tokenizer no longer has its chat template; "
        "load the model with the tokenizer it had then"
    )


def _load_tasks(one: Stored, load: Callable[[str], Task] | None) -> list[Task]:
    """The tasks as they were run: of the same groups, with the same metadata and few-shot examples.

    Raises:
        TaskError: one is not to be found, or is no longer what it was.
    """
    source = TaskSource(one.include_path, one.metadata)
    loaded: dict[str, Task] = {}
    for name in one.tasks:
        if load is not None:
            loaded[name] = load(name)
        elif name not in loaded:
            found = _load_as_run(one, name, source)
            if (metadata := _further_metadata(one, name, found[name])) is not None:
                found = _load_as_run(one, name, TaskSource(one.include_path, metadata))
            loaded |= found
    for name in one.tasks:
        task, then = loaded[name], one.configs[name]
        check_consent(task, RunForm(confirm_run_unsafe_code=one.flags["confirm_run_unsafe_code"]))
        now = _as_json(task.dump_config())
        for field in _PROMPT_FIELDS:
            # A function is dumped as its source, which may change and do the same.
            if callable(getattr(task.config, field, None)) or then.get(field) == now.get(field):
                continue
            raise TaskError(
                f"{one.path} cannot be repeated: {field} of task {name} was {str(then.get(field))[:200]!r} and is "
                f"{str(now.get(field))[:200]!r}; name the folder of the task as it was by --include-path"
            )
        task.set_config("num_fewshot", then.get("num_fewshot", 0))
    return [loaded[name] for name in one.tasks]


def _load_as_run(one: Stored, name: str, source: TaskSource) -> dict[str, Task]:
    """A task and the others of the group that it was run in; a group may configure its tasks otherwise."""
    inner = set(itertools.chain.from_iterable(one.groups.values()))
    group = next((group for group in one.groups if group not in inner and name in _members(one, group)), name)
    try:
        found = source.load_all(group)
        if name not in found:
            raise TaskError(f"{group} no longer holds the task {name}")
    except TaskError as error:
        origin = (one.configs[name].get("metadata") or {}).get("config_source")
        named = f"; it came from {origin}" if origin not in (None, "inline") else ""
        hint = f"{named}; name the folder of its YAML file by --include-path"
        raise TaskError(f"{one.path} cannot be repeated: {error}{hint}") from error
    return {task: found[task] for task in found if task in one.tasks}


def _members(one: Stored, group: str) -> set[str]:
    found: set[str] = set()
    for child in one.groups.get(group, ()):
        found |= _members(one, child) if child in one.groups else {child}
    return found


def _further_metadata(one: Stored, name: str, task: Task) -> dict[str, Any] | None:
    """The metadata that the run had from ``--metadata`` besides model_args; None where it had no other.

    Raises:
        TaskError: the task has another version now.
    """
    then = dict(one.configs[name].get("metadata") or {})
    now = _as_json(task.config.metadata or {})
    if then.get("version") != now.get("version"):
        raise TaskError(
            f"{one.path} cannot be repeated: task {name} had the version {then.get('version')} and has "
            f"{now.get('version')}; install the lm-eval or the task that it had"
        )
    # Where a task is defined may differ between machines.
    further = {key: value for key, value in then.items() if key != "config_source" and value != now.get(key)}
    return {**one.metadata, **further} if further else None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=handle_non_serializable))


def _compare(one: Stored, task: str, after: Path) -> Repeated:
    before = one.samples[task]
    pairs = list(itertools.zip_longest(before.read_bytes().splitlines(), after.read_bytes().splitlines()))
    differing = sum(first != second for first, second in pairs)
    return Repeated(one.path, task, sha256_file(before), sha256_file(after), differing, len(pairs))


def _check_identity(one: Stored, now: Mapping[str, Any]) -> None:
    then = one.info["t2"]
    if then["digest"] == now["digest"]:
        return
    for name in now:
        if name != "digest" and name in then and then[name] != json.loads(json.dumps(now[name])):
            raise ArgumentError(
                f"{one.path} cannot be repeated: its {name} was {str(then[name])[:200]} and is {str(now[name])[:200]}"
            )


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """A cache of its own with the bases and downloads of the user's, and nothing of what was adapted or answered."""
    home, before = cache_dir(), os.environ.get("T2_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="t2-cache-") as folder:
        for name in _KEPT:
            (home / name).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).symlink_to(home.absolute() / name, target_is_directory=True)
        os.environ["T2_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("T2_CACHE_DIR")
            else:
                os.environ["T2_CACHE_DIR"] = before
