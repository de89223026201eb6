"""Results of lm-eval, as ``--output_path DIR --log_samples`` writes them, in one typed shape for each task.

lm-eval writes a ``results_*.json`` for each evaluation and a ``samples_<task>_*.jsonl`` for each of its tasks. What is
kept of a sample are hashes and scores: enough to pair two evaluations example by example, and no text of the data set.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from t2.core.digests import canonical_json, digest_of, sha256
from t2.core.errors import ResultsError
from t2.core.record import AdaptationRecord, ExpertRef
from t2.core.references import DIGEST_PATTERN
from t2.core.times import Time
from t2.core.validation import first_fault

_STDERR = "_stderr"
_MEANS = ("acc", "acc_norm", "exact_match")
"""Metrics that lm-eval aggregates by their mean where a task does not say how."""
_NEITHER = ("device", "batch_size", "max_batch_size")
"""Arguments of a model that decide where and how fast it answers, and not what."""
_LARGEST_EXPONENT = 700.0
"""Largest exponent whose exponential is a finite float, rounded down."""
_HASH = re.compile(DIGEST_PATTERN)
NO_METRIC = "bypass"
"""lm-eval's placeholder for all metrics under ``--predict_only``; its score is 999."""

MAX_SAMPLE_SCORE = 1e100
"""Largest absolute score of a sample; sums of squares of such scores stay finite."""

Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Sample(_Frozen):
    """One scored document.

    Attributes:
        doc_hash, prompt_hash, target_hash: SHA-256, by lm-eval, of the document, its prompt and the right answer.
        answers: by filter, the SHA-256 of the filtered answers.
        scores: by ``metric,filter``; metrics whose value for one document is no finite number are not in it.
    """

    doc_hash: Digest
    prompt_hash: Digest
    target_hash: Digest
    answers: dict[Label, Digest]
    scores: dict[Label, Annotated[float, Field(ge=-MAX_SAMPLE_SCORE, le=MAX_SAMPLE_SCORE)]]

    @property
    def line(self) -> str:
        """Its canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


class Score(_Frozen):
    """What a task's metric says of all documents together.

    Attributes:
        metric, filter: as lm-eval calls them.
        score: None where it is not finite.
        stderr: its standard error by lm-eval; None where it tells none.
        n: documents that it was computed from.
        higher_is_better: its direction; true where the task does not say.
        aggregation: ``mean`` where the score is the mean of the samples' scores, else ``other``.
    """

    metric: Label
    filter: Label
    score: float | None
    stderr: float | None
    n: int = Field(ge=0)
    higher_is_better: bool
    aggregation: Literal["mean", "other"]

    @property
    def key(self) -> str:
        """``metric,filter``: the name in :attr:`Sample.scores`."""
        return f"{self.metric},{self.filter}"

    def agrees_with(self, values: Sequence[float]) -> bool:
        """Whether the score follows from the samples' scores.

        This can be computed for means and for lm-eval's ``perplexity``, exp(−mean), which is recognised by name. For
        other aggregations the samples lack the inputs (weights, texts), or the function is not known.
        """
        if self.score is None or not values or len(values) != self.n:
            return False
        mean = math.fsum(values) / len(values)
        expected = [mean]
        if self.aggregation != "mean" and self.metric == "perplexity":
            expected.append(math.exp(min(-mean, _LARGEST_EXPONENT)))
        return any(math.isclose(each, self.score, rel_tol=1e-6, abs_tol=1e-9) for each in expected)


class EvaluatedBase(_Frozen):
    """The base model; only results of t2 have a fingerprint and an identity.

    Attributes:
        id: the name it was loaded by; see :func:`model_name`.
        fingerprint: digest of its adapted matrices; says which experts fit it.
        identity: digest of everything that determines its answers; equal for runs of the same model.
    """

    id: Label
    revision: Label | None = None
    fingerprint: Digest | None = None
    identity: Digest | None = None

    @pydantic.model_serializer(mode="wrap")
    def _omit_unknown_identity(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that runs without an identity keep their digests.
        return {name: value for name, value in dump(self).items() if name != "identity" or value is not None}


class TaskRun(_Frozen):
    """One task of one evaluation, without its samples.

    Attributes:
        task, task_version, n_shot: what was asked.
        docs: number of scored documents.
        docs_digest: SHA-256 over the sorted hashes of the documents: runs with the same one scored the same.
        prompts_digest: the same over document and prompt together.
        samples_digest: SHA-256 of :func:`samples_bytes`.
        scores: by metric and filter, the task's first one first.
        model: lm-eval's name of the model, such as ``t2`` or ``hf``.
        base: what the model was loaded from.
        dtype: of its weights; empty where lm-eval did not tell.
        strategy: of t2; ``none`` for a plain model, ``peft`` for one with an adapter.
        control: of t2.
        experts: that took part, and their digests; none for a plain model.
        settings: what bears on the answers: of t2 its resolved settings, else the arguments of the model.
        evaluation: what lm-eval was told besides: arguments of generation, hashes of chat template and
            system instruction.
        seeds: by what they seed.
        record: t2's adaptation record.
        versions: of the programs; not part of :meth:`digest`.
        evaluated_at: when; not part of :meth:`digest`.
    """

    schema_version: Literal[1] = 1
    task: Label
    task_version: Label
    n_shot: int = Field(ge=0, le=10_000)
    docs: int = Field(ge=1)
    docs_digest: Digest
    prompts_digest: Digest
    samples_digest: Digest
    scores: tuple[Score, ...] = Field(min_length=1, max_length=100)
    model: Label
    base: EvaluatedBase
    dtype: str = Field(max_length=200)
    strategy: Label
    control: Label
    experts: tuple[ExpertRef, ...] = Field(max_length=1000)
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    seeds: dict[Label, Annotated[int, Field(ge=-(2**63), lt=2**63)]]
    record: AdaptationRecord | None
    versions: dict[Label, str]
    evaluated_at: Time | None

    @pydantic.field_validator("experts")
    @classmethod
    def _by_digest(cls, experts: tuple[ExpertRef, ...]) -> tuple[ExpertRef, ...]:
        for expert in experts:
            labels = (expert.name, expert.domain or "")
            if not _HASH.fullmatch(expert.digest) or any(len(label) > 200 or "\x00" in label for label in labels):
                raise ValueError("each has the SHA-256 of its file as its digest, and a name of at most 200 characters")
        return experts

    def digest(self) -> str:
        """Hex SHA-256 of what was measured on what.

        Neither time nor machine, the standard errors of a bootstrap, nor the way to the experts are part of it: the
        same evaluation again has the same digest where it gives the same samples.
        """
        content = self.model_dump(mode="json", exclude={"versions", "evaluated_at", "experts", "record", "scores"})
        return digest_of(
            {
                **content,
                "experts": [expert.content for expert in self.experts],
                "record": self.record.digest() if self.record is not None else None,
                "scores": [score.model_dump(mode="json", exclude={"stderr"}) for score in self.scores],
            }
        )

    def score(self, metric: str | None = None, filter: str | None = None) -> Score:
        """A score by name, the first one without.

        Raises:
            ResultsError: there is no such metric or filter.
        """
        for score in self.scores:
            if metric in (None, score.metric) and filter in (None, score.filter):
                return score
        known = ", ".join(score.key for score in self.scores)
        raise ResultsError(f"{self.task} has no score {metric or '*'},{filter or '*'}; it has: {known}")


@dataclass(frozen=True)
class TaskResult:
    """One task of one evaluation, with its samples by the hash of their documents."""

    run: TaskRun
    samples: tuple[Sample, ...]

    def values(self, score: Score) -> list[float]:
        """What the samples scored, in their order; those without a number for this metric are left out."""
        return [sample.scores[score.key] for sample in self.samples if score.key in sample.scores]

    def by_document(self, score: Score) -> dict[str, list[float]]:
        """Return a score's values by document hash; several if the data set repeats the document."""
        found: dict[str, list[float]] = {}
        for sample in self.samples:
            if score.key in sample.scores:
                found.setdefault(sample.doc_hash, []).append(sample.scores[score.key])
        return found


def first_metric(listed: Sequence[str], computed: Sequence[str]) -> str:
    """Return a task's first metric, the default for searching, ranking and comparing.

    Args:
        listed: the metrics that the task lists, in the order of its ``metric_list``.
        computed: the metrics that the task computed, in the order of its ``process_results``; not empty. A listed
            metric may be computed under other names: ``pass_at_k`` gives ``pass@1``.
    """
    known = set(listed)
    if listed and listed[0] not in computed and computed[0] not in known:
        return computed[0]
    return next((name for name in listed if name in computed), computed[0])


def in_order(samples: Iterable[Sample]) -> list[Sample]:
    """Sort samples as in a run's file: by document, then prompt, right answer and line.

    The position in the data set is not used, because it is not part of a sample.
    """
    content = attrgetter("doc_hash", "prompt_hash", "target_hash")
    ordered = sorted(samples, key=content)
    if len({content(sample) for sample in ordered}) < len(ordered):
        ordered.sort(key=attrgetter("doc_hash", "prompt_hash", "target_hash", "line"))
    return ordered


def samples_bytes(samples: Iterable[Sample]) -> bytes:
    """The file of samples: a line of canonical JSON each, by the hash of their documents."""
    return "".join(f"{sample.line}\n" for sample in in_order(samples)).encode()


def samples_digests(samples: Sequence[Sample]) -> tuple[str, str, str]:
    """The digests of documents, of prompts, and of the samples themselves, as :class:`TaskRun` has them."""
    ordered = in_order(samples)
    docs = digest_of([sample.doc_hash for sample in ordered])
    prompts = digest_of([[sample.doc_hash, sample.prompt_hash] for sample in ordered])
    return docs, prompts, sha256(samples_bytes(ordered))


def find_results(path: Path) -> list[Path]:
    """The ``results_*.json`` of a folder and those in it, oldest first; a file is itself.

    Raises:
        ResultsError: there is no such path, or none is in it.
    """
    if path.is_file():
        return [path]
    found = sorted(path.rglob("results_*.json"), key=lambda file: (file.name, str(file)))
    if not found:
        what = "holds no results_*.json" if path.is_dir() else "is not there"
        raise ResultsError(f"{path} {what}; give the folder that lm_eval got as --output_path, with --log_samples")
    return found


def read_results(path: Path) -> list[TaskResult]:
    """The tasks of one evaluation, sorted by name.

    Args:
        path: a results file, or a folder that holds one.

    Raises:
        ResultsError: there is none or more than one; it is cut or none of lm-eval's; samples are missing, or are not
            those of the results; a sample is repeated; or it was evaluated with ``--predict_only``.
    """
    found = find_results(path)
    if len(found) > 1:
        raise ResultsError(f"{path} holds {len(found)} results; name one of them, such as {found[-1]}")
    (file,) = found
    results = _read_json(file)
    tasks = results.get("configs")
    if not isinstance(tasks, dict) or not tasks:
        raise ResultsError(f"{file} is no results file of lm-eval: it tells of no task")
    stamp = file.stem.rpartition("_")[2]
    return [from_lm_eval(results, task, _read_samples(file, task, stamp), str(file)) for task in sorted(tasks)]


def from_lm_eval(results: Mapping[str, Any], task: str, samples: Sequence[Any], source: str) -> TaskResult:
    """One task of what ``lm_eval.simple_evaluate`` returned, or of what was read from its files.

    Args:
        results: as ``results_*.json`` holds them.
        samples: the task's samples, as logged.
        source: for errors.

    Raises:
        ResultsError: as :func:`read_results`.
    """
    where = f"{source}, task {task}"
    try:
        config = _mapping(results["config"])
        stated = _mapping(results["results"])[task]
        version, n_shot = results["versions"][task], results["n-shot"][task]
        directions = _mapping(results["higher_is_better"])[task]
        metric_list = _mapping(_mapping(results["configs"])[task]).get("metric_list") or ()
        aggregations = {entry.get("metric"): entry.get("aggregation") for entry in metric_list}
        listed = _listed(metric_list, directions)
        wanted = [(key, *key.rsplit(",", 1)) for key in stated if "," in key]
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{where}: it is no results file of lm-eval 0.4.13: {error} is missing") from error
    merged = _merge(samples, where)
    claimed = _mapping(results.get("task_hashes") or {}).get(task)
    if claimed is not None and claimed != _task_hash(samples):
        raise ResultsError(
            f"{where}: its samples are not those of its results, by lm-eval's task hash; let lm_eval write both again"
        )
    if listed == [NO_METRIC] or {metric.removesuffix(_STDERR) for _, metric, _ in wanted} == {NO_METRIC}:
        raise ResultsError(f"{where}: evaluated with --predict_only, so it has no score; evaluate without the flag")
    scores: dict[str, list[Score]] = {}
    counts = [0]
    for key, metric, filter_ in wanted:
        if metric.endswith(_STDERR) and f"{metric.removesuffix(_STDERR)},{filter_}" in stated:
            continue
        if metric == NO_METRIC:
            continue
        score, error_ = _finite(stated[key]), _finite(stated.get(f"{metric}{_STDERR},{filter_}"))
        values = [sample.scores[key] for sample in merged if key in sample.scores]
        n = sum(sample["filter"] == filter_ and metric in sample["metrics"] for sample in samples)
        counts.append(n)
        how = aggregations.get(metric) or ("mean" if metric in _MEANS else None)
        if how == "nanmean":
            n = len(values)
        mean = math.fsum(values) / len(values) if values and len(values) == n else None
        same = mean is not None and score is not None and math.isclose(mean, score, rel_tol=1e-6, abs_tol=1e-9)
        if how == "mean" and score is not None and not same:
            said = f"its samples have the mean {mean:.6g}" if mean is not None else "it has no samples"
            if n > len(values):
                said = f"{n - len(values)} of its {n} samples have no number"
            raise ResultsError(f"{where}: {key} is stated as {score:.6g}, and {said}; let lm_eval write both again")
        scores.setdefault(filter_, []).append(
            Score(
                metric=metric,
                filter=filter_,
                score=score,
                stderr=error_,
                n=n,
                higher_is_better=directions.get(metric) is not False,
                aggregation="mean" if same else "other",
            )
        )
    effective = _mapping(_mapping(results.get("n-samples") or {}).get(task) or {}).get("effective")
    if effective is not None and effective != max(counts):
        raise ResultsError(
            f"{where}: {max(counts)} samples, but {effective} documents were scored; let lm_eval write both again"
        )
    docs, prompts, digest = samples_digests(merged)
    try:
        run = TaskRun(
            task=task,
            task_version=str(version),
            n_shot=n_shot or 0,
            docs=len(merged),
            docs_digest=docs,
            prompts_digest=prompts,
            samples_digest=digest,
            scores=tuple(score for some in scores.values() for score in _sort_first_metric_first(some, listed)),
            evaluation=_evaluation(results, config),
            versions=_versions(results),
            evaluated_at=_time(results.get("date")),
            **_identity(results, config, task),
        )
    except pydantic.ValidationError as error:
        raise ResultsError(f"{where}: {first_fault(error)}") from error
    return TaskResult(run, tuple(merged))


def _listed(metric_list: Sequence[Mapping[str, Any]], directions: Mapping[str, Any]) -> list[str]:
    """Return the metrics that a task lists, in its order.

    lm-eval writes a metric that is a function as its source, and writes no list for a task with the default metrics of
    its output type. In these cases ``directions`` has the names in the same order.
    """
    names = [str(entry.get("metric")) for entry in metric_list]
    return names if names and set(names) <= directions.keys() else list(directions)


def _sort_first_metric_first(scores: Sequence[Score], listed: Sequence[str]) -> list[Score]:
    first = first_metric(listed, [score.metric for score in scores])
    return sorted(scores, key=lambda score: score.metric != first)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ResultsError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{file} is cut, or no JSON; let lm_eval write it again") from error
    if not isinstance(value, dict) or not {"results", "configs", "config", "versions"} <= value.keys():
        raise ResultsError(f"{file} is no results file of lm-eval")
    return value


def _read_samples(file: Path, task: str, stamp: str) -> list[Any]:
    path = file.parent / f"samples_{task}_{stamp}.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise ResultsError(f"the samples {path} are not there; run lm_eval with --log_samples") from error
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                samples.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ResultsError(f"{path}, line {number} is cut, or no JSON; let lm_eval write it again") from error
    return samples


def _merge(samples: Sequence[Any], where: str) -> list[Sample]:
    """Merge lm-eval's samples, one per filter, by document and position in the data set."""
    merged: dict[tuple[str, int | None], dict[str, Any]] = {}
    for number, sample in enumerate(samples, start=1):
        hashes = {name: _hash(sample, name, f"{where}, sample {number}") for name in _HASHES}
        filter_, metrics = sample.get("filter"), sample.get("metrics")
        if not isinstance(filter_, str) or not isinstance(metrics, list) or "filtered_resps" not in sample:
            raise ResultsError(f"{where}, sample {number} is none of lm-eval's: no filter, metrics or filtered_resps")
        place = sample.get("doc_id")
        key = hashes["doc_hash"], place if isinstance(place, int) else None
        one = merged.setdefault(key, {**hashes, "answers": {}, "scores": {}})
        if filter_ in one["answers"]:
            raise ResultsError(
                f"{where}: the document {hashes['doc_hash'][:12]} appears twice with doc_id {place}, again as sample "
                f"{number}; let lm_eval write the samples again"
            )
        if any(one[name] != value for name, value in hashes.items()):
            raise ResultsError(f"{where}: the document {hashes['doc_hash'][:12]} has another prompt under {filter_}")
        one["answers"][filter_] = digest_of(_texts(sample["filtered_resps"]))
        for metric in metrics:
            value = _finite(sample.get(metric))
            if value is not None:
                one["scores"][f"{metric},{filter_}"] = value
    if not merged:
        raise ResultsError(f"{where}: it has no samples; run lm_eval with --log_samples")
    try:
        return in_order(Sample(**fields) for fields in merged.values())
    except pydantic.ValidationError as error:
        raise ResultsError(f"{where}, a sample: {first_fault(error)}") from error


_HASHES = ("doc_hash", "prompt_hash", "target_hash")


def _hash(sample: Any, name: str, where: str) -> str:
    value = sample.get(name) if isinstance(sample, dict) else None
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ResultsError(f"{where} has no {name}; let lm-eval 0.4.13 write it")
    return value


def _task_hash(samples: Sequence[Any]) -> str:
    """As lm-eval computes ``task_hashes``, from samples that were checked."""
    return sha256("".join(sample[name] for sample in samples for name in _HASHES).encode())


def _texts(value: Any) -> Any:
    """Answers as lm-eval writes them into files: all leaves as text."""
    return [_texts(each) for each in value] if isinstance(value, list | tuple) else str(value)


def _finite(value: Any) -> float | None:
    """A number, of NumPy or not, as a float; None for what is none or not finite."""
    value = value.item() if hasattr(value, "item") and not isinstance(value, list) else value
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError("a table of names")
    return value


def _identity(results: Mapping[str, Any], config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What answered: of t2 by its own word, else by the arguments of the model."""
    model = str(config.get("model") or results.get("model_source") or "unknown")
    seeds = {
        name.removesuffix("_seed"): config[name]
        for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
        if isinstance(config.get(name), int)
    }
    said = config.get("t2")
    if said is None:
        given = _arguments(config.get("model_args"))
        return {
            "model": model,
            "base": {
                "id": model_name(
                    str(given.get("pretrained") or results.get("model_name") or model), given.get("gguf_file")
                ),
                "revision": str(given["revision"]) if given.get("revision") else None,
            },
            "dtype": str(config.get("model_dtype") or "").removeprefix("torch."),
            "strategy": "peft" if given.get("peft") or given.get("delta") else "none",
            "control": "none",
            "experts": (),
            "settings": {name: value for name, value in given.items() if name not in _NEITHER},
            "seeds": seeds,
            "record": None,
        }
    settings = dict(said.get("settings") or {})
    for name in ("adapt_seed", "control_seed"):
        if isinstance(settings.get(name), int):
            seeds[name.removesuffix("_seed")] = settings[name]
    record = next((each for each in said.get("records") or () if each.get("task") == task), None)
    return {
        "model": model,
        "base": said.get("base"),
        "dtype": said.get("dtype"),
        "strategy": (record or {}).get("strategy") or settings.get("adapt") or "none",
        "control": (record or {}).get("control") or settings.get("control") or "none",
        "experts": (record or said).get("experts") or (),
        "settings": settings,
        "seeds": seeds,
        "record": record,
    }


def model_name(pretrained: str, gguf_file: str | None = None) -> str:
    """Return the display name of a base model: the last part of a path, or a Hub name unchanged.

    The result depends only on the text, since a results file may be read on a machine without the folder. So
    ``models/llama``, which may be a Hub name, keeps both parts.
    """
    if pretrained.startswith(("/", "./", "../", "~")) or pretrained.count("/") > 1:
        pretrained = Path(pretrained).name or pretrained
    return f"{pretrained}/{gguf_file}" if gguf_file else pretrained


def _arguments(given: Any) -> dict[str, Any]:
    """``model_args``, as text or as a table, as plain JSON."""
    if isinstance(given, Mapping):
        return {
            str(name): value if isinstance(value, bool | int | str) else str(value) for name, value in given.items()
        }
    pairs = (pair.partition("=") for pair in given.split(",")) if isinstance(given, str) else ()
    return {name.strip(): value for name, equals, value in pairs if equals}


def _evaluation(results: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        "gen_kwargs": config.get("gen_kwargs"),
        "chat_template": results.get("chat_template_sha"),
        "system_instruction": results.get("system_instruction_sha"),
        "fewshot_as_multiturn": results.get("fewshot_as_multiturn") if results.get("chat_template_sha") else None,
    }
    return {name: json.loads(json.dumps(value, default=str)) for name, value in told.items() if value is not None}


def _versions(results: Mapping[str, Any]) -> dict[str, str]:
    names = {"lm_eval": "lm_eval_version", "transformers": "transformers_version"}
    return {name: str(results[key]) for name, key in names.items() if results.get(key)}


def _time(value: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(value), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
