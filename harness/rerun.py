"""Results done again from what they say of themselves, and compared sample for sample."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.utils import simple_parse_args_string

from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, DataError
from t2.core.settings import cache_dir
from t2.harness import compat
from t2.harness.args import parse_args
from t2.harness.evaluating import RunForm, evaluate_tasks, write_results
from t2.harness.model import T2LM
from t2.harness.opened import Opened, open_model
from t2.harness.tasks import TaskSource

_KEPT = ("bases", "digests", "experts")
"""Of the cache what a rerun may use: none of it holds an adaptation or an answer."""


@dataclass(frozen=True)
class Stored:
    """Results on disk, and all that doing them again takes.

    Attributes:
        path: the file of lm-eval's results.
        tasks: in their order.
        samples: the file of the samples of each task.
        model_args: of the model.
        form: how lm-eval was run.
        identity: digest of what answered, with the parts it was made of.
    """

    path: Path
    tasks: tuple[str, ...]
    samples: Mapping[str, Path]
    model_args: Mapping[str, Any]
    form: RunForm
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Repeated:
    """One task of results that were done again.

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
    """Read results of ``lm_eval --model t2 --log_samples``, or of a cell of a comparison.

    Args:
        path: the file of the results.
        include_path: a folder of further tasks, which results do not tell.
        confirm_run_unsafe_code: run what the model writes, where a task does.

    Raises:
        DataError: they are damaged, of another model, or without samples.
    """
    try:
        results = json.loads(path.read_bytes())
        config, own = results["config"], results["config"]["t2"]
        tasks = tuple(record["task"] for record in own["records"])
        shots = {results["n-shot"][task] for task in tasks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold results of lm_eval --model t2 ({error!r}); name such a file") from error
    date = path.stem.removeprefix("results_")
    samples = {task: path.with_name(f"samples_{task}_{date}.jsonl") for task in tasks}
    for file in samples.values():
        if not file.is_file():
            raise DataError(f"{path} has no samples beside it ({file.name}); run with --log_samples")
    args = config.get("model_args") or {}
    form = RunForm(
        limit=config.get("limit"),
        # Of several tasks each has its own then, as in the run.
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        apply_chat_template=bool(results.get("chat_template")),
        system_instruction=results.get("system_instruction"),
        gen_kwargs=config.get("gen_kwargs") or {},
        batch_size=config.get("batch_size") or 1,
        device=config.get("device"),
        include_path=include_path,
        seed=(config["random_seed"], config["numpy_seed"], config["torch_seed"], config["fewshot_seed"]),
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    given = simple_parse_args_string(args) if isinstance(args, str) else dict(args)
    return Stored(path, tasks, samples, given, form, own)


def rerun(
    stored: Sequence[Stored],
    load: Callable[[str], Task] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Repeated]:
    """Do results again, without anything that an earlier adaptation left in the cache, and compare the samples.

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
            args = {**one.form.base_args(), **one.model_args}
            args.pop("record", None)
            settings = parse_args(args)
            if opened is None or not opened.serves(settings):
                opened = open_model(settings)
            lm = T2LM.sharing(opened, args)
            _check_identity(one, lm.identity())
            say(f"{one.path} ({number} of {len(stored)})")
            tasks = [(load or TaskSource(one.form.include_path, one.model_args).load)(name) for name in one.tasks]
            with tempfile.TemporaryDirectory(prefix="t2-rerun-") as folder:
                tracker, results = evaluate_tasks(lm, tasks, one.form, one.model_args)
                _, files = write_results(tracker, results, Path(folder))
                for task in one.tasks:
                    yield _compare(one, task, files[task])


def _compare(one: Stored, task: str, after: Path) -> Repeated:
    before = one.samples[task]
    pairs = list(itertools.zip_longest(before.read_bytes().splitlines(), after.read_bytes().splitlines()))
    differing = sum(first != second for first, second in pairs)
    return Repeated(one.path, task, sha256_file(before), sha256_file(after), differing, len(pairs))


def _check_identity(one: Stored, now: Mapping[str, Any]) -> None:
    if one.identity["digest"] == now["digest"]:
        return
    for name in ("base", "dtype", "experts", "settings"):
        if one.identity.get(name) != json.loads(json.dumps(now[name])):
            raise ArgumentError(
                f"{one.path} cannot be done again: its {name} was {str(one.identity.get(name))[:200]} and is "
                f"{str(now[name])[:200]}"
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
