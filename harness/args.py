"""The ``model_args`` of ``--model t2``: one table, and the parser that refuses what is not in it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lm_eval.utils import simple_parse_args_string

from t2.adapters.controls import CONTROLS, Control
from t2.adapters.expert import Normalise, Space
from t2.adapters.search import NO_BUDGET, SEARCHES, Budget
from t2.adapters.strategies.base import ECONOMIES, Economy, Options, Per
from t2.adapters.targets import MOE, parse_layers
from t2.core.errors import ArgumentError, nearest

ENGINES = ("hf", "hf-multimodal", "vllm")

Kind = Literal[
    "choice",
    "integer",
    "number",
    "flag",
    "text",
    "label",
    "names",
    "numbers",
    "layers",
    "level",
    "file",
    "count",
    "budget",
]

EXPERTS = ("expert", "mix", "best", "prompt", "classifier", "cem", "auto")
"""Strategies that use experts."""
MIXTURES = ("mix", "cem", "auto")
"""Strategies whose coefficients need not sum to 1."""
LABELLED = ("best", "cem", "auto")
"""Strategies that see labelled docs."""
SEARCHING = ("cem", "auto")
"""Strategies that search mixtures on labelled docs."""
DISPATCHING = ("prompt", "classifier", "auto")
"""Strategies that send each prompt to the expert of its domain."""


@dataclass(frozen=True)
class ArgSpec:
    """One ``model_arg`` of t2.

    Attributes:
        kind: how its value is parsed; a ``level`` is a number or one of ``values``, a ``label`` is a text that may be
            ``none``.
        default: None means that there is none, or that it follows from elsewhere; ``help`` says which.
        help: what it does, for the documentation.
        values: of a choice.
        low, high: bounds of a number, both allowed; ``elite`` excludes its lower bound.
        strategies: the values of ``adapt`` that it has an effect with; empty means all.
    """

    kind: Kind
    default: Any
    help: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    strategies: tuple[str, ...] = ()


MODEL_ARGS: dict[str, ArgSpec] = {
    "engine": ArgSpec(
        "choice", "hf", "what runs the model: transformers, also for models that see images, or vLLM", ENGINES
    ),
    "adapt": ArgSpec(
        "choice",
        "none",
        "the base, one expert, a mixture, the best expert, dispatch, few-shot search, one of these, or a PEFT adapter",
        ("none", "expert", "mix", "best", "prompt", "classifier", "cem", "auto", "peft"),
    ),
    "peft": ArgSpec("file", None, "for adapt=peft: the folder of an adapter of PEFT", strategies=("peft",)),
    "experts": ArgSpec(
        "names",
        None,
        "names, references, files or folders joined by +; by default kind expert, this base, one per domain",
        strategies=EXPERTS,
    ),
    "registry": ArgSpec(
        "text",
        None,
        "the registry that references and default experts come from: a URL or a folder; by default T2_REGISTRY_URL",
        strategies=EXPERTS,
    ),
    "alpha": ArgSpec(
        "numbers",
        None,
        "for mix: coefficients joined by +, in the order of experts; by default uniform",
        strategies=("mix",),
    ),
    "control": ArgSpec(
        "choice", "none", "replace each expert by its control, before any search", CONTROLS, strategies=EXPERTS
    ),
    "control_seed": ArgSpec("integer", 0, "seed of the control", strategies=EXPERTS),
    "shots": ArgSpec(
        "integer", 10, "adaptation docs drawn from the task's pool; 3 with light", low=1, strategies=LABELLED
    ),
    "adapt_seed": ArgSpec("integer", 0, "seed of the drawing and of the search", strategies=LABELLED),
    "metric": ArgSpec("label", None, "metric of the objective; by default the task's first", strategies=LABELLED),
    "filter": ArgSpec("label", None, "filter of the objective; by default the task's first", strategies=LABELLED),
    "search": ArgSpec(
        "choice",
        "cem",
        "how cem and auto search: the cross-entropy method, CMA-ES, or samples of one distribution",
        SEARCHES,
        strategies=SEARCHING,
    ),
    "population": ArgSpec("integer", 32, "candidates of a generation", low=1, strategies=SEARCHING),
    "generations": ArgSpec(
        "integer", 100, "generations at most, with early stop; 10 with light", low=1, strategies=SEARCHING
    ),
    "elite": ArgSpec(
        "number",
        0.2,
        "share of a generation that refits search=cem, above 0",
        low=0,
        high=1,
        strategies=SEARCHING,
    ),
    "light": ArgSpec(
        "flag",
        False,
        "3 shots and 10 generations (the paper's Table 10), unless these are given",
        strategies=LABELLED,
    ),
    "budget": ArgSpec(
        "budget", NO_BUDGET, "what a search may spend: evaluations (200) or time (60s, 5m, 1h)", strategies=SEARCHING
    ),
    "economy": ArgSpec(
        "choice",
        "exact",
        "what a search leaves out: nothing, what cannot matter, late generations, or also half of each early on",
        ECONOMIES,
        strategies=SEARCHING,
    ),
    "preselect": ArgSpec(
        "count", 8, "of more experts than this search the best so many; none searches all", low=1, strategies=SEARCHING
    ),
    "per": ArgSpec(
        "choice",
        "expert",
        "one coefficient per expert, or per expert and what",
        ("expert", "layer", "matrix"),
        strategies=SEARCHING,
    ),
    "space": ArgSpec(
        "choice", "paper", "z' = sum(a z), or delta: z' = 1 + sum(a (z-1))", ("paper", "delta"), strategies=MIXTURES
    ),
    "normalise": ArgSpec(
        "choice", "none", "divide the coefficients by their sum", ("none", "sum"), strategies=MIXTURES
    ),
    "rescale": ArgSpec(
        "choice", "none", "keep the nuclear norm of each matrix", ("none", "nuclear"), strategies=EXPERTS
    ),
    "dispatch": ArgSpec(
        "choice",
        "likelihood",
        "how prompt and classifier decide a domain: by its label's likelihood, or by the label that is generated",
        ("likelihood", "generate"),
        strategies=DISPATCHING,
    ),
    "threshold": ArgSpec(
        "level",
        "calibrate",
        "confidence below which a decision does not stand; calibrate finds it on held-out prompts, 0 is never",
        ("calibrate",),
        low=0,
        high=1,
        strategies=DISPATCHING,
    ),
    "fallback": ArgSpec(
        "choice",
        "mixture",
        "what answers then: the experts mixed by their posteriors, or base",
        ("mixture", "base"),
        strategies=DISPATCHING,
    ),
    "layers": ArgSpec(
        "layers",
        None,
        "adapt these decoder layers only, for example 0-15+20; by default the expert's own",
        strategies=EXPERTS,
    ),
    "rank": ArgSpec(
        "integer",
        None,
        "let the first so many components of each matrix move; by default all",
        low=1,
        strategies=EXPERTS,
    ),
    "transfer": ArgSpec(
        "choice",
        "none",
        "experts of other weights: strict where names and ranks agree, resample from a model of any depth and width",
        ("none", "strict", "resample"),
        strategies=EXPERTS,
    ),
    "moe": ArgSpec(
        "choice",
        "refuse",
        "a base with mixture-of-experts layers: refuse it, or skip these layers' routers and routed experts",
        MOE,
    ),
    "overlap": ArgSpec(
        "choice",
        "mark",
        "experts that were trained on docs they are scored or adapted on: mark the result, or refuse it",
        ("mark", "refuse"),
        strategies=EXPERTS,
    ),
    "record": ArgSpec("file", None, "a JSON file for the adaptation records, besides results and cache"),
    "batch": ArgSpec(
        "integer",
        None,
        "rows of a batch at most, during a search or dispatch; by default as many as memory holds, 32 on a CPU",
        low=1,
    ),
    "mixed": ArgSpec(
        "choice",
        "exact",
        "one batch for answers generated under several mixtures, where it is faster: exact is in float32 only",
        ("exact", "always", "never"),
        strategies=DISPATCHING,
    ),
    "workers": ArgSpec(
        "integer",
        None,
        "so many workers with models of their own (Ray) answer during searches and dispatches; by default none",
        low=1,
        strategies=EXPERTS,
    ),
}

FROM_PRETRAINED: dict[str, str] = {
    "attn_implementation": "attention kernel: eager, sdpa, flash_attention_2",
    "device_map": "placement of the layers, by accelerate",
    "load_in_4bit": "quantise while loading (bitsandbytes)",
    "load_in_8bit": "quantise while loading (bitsandbytes)",
    "bnb_4bit_compute_dtype": "dtype of the arithmetic over 4-bit weights",
    "bnb_4bit_quant_type": "nf4 or fp4",
    "bnb_4bit_use_double_quant": "quantise the quantisation constants too",
    "cache_dir": "where downloads are kept",
    "local_files_only": "never ask the Hub",
    "token": "access token of the Hub",
    "use_safetensors": "refuse pickled weights",
    "variant": "file variant on the Hub, for example fp16",
}
"""Arguments of ``from_pretrained`` that are passed on."""

_VLLM = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "enable_prefix_caching",
    "kv_cache_dtype",
)
"""Arguments of vLLM that are told apart from misspelt ones where it is not installed."""

_NAMES = (
    "pretrained",
    "revision",
    "subfolder",
    "tokenizer",
    "delta",
    "gguf_file",
    "offload_folder",
    "cache_dir",
    "token",
    "variant",
)
"""Arguments of the base model that are names, although lm-eval may parse them as numbers."""
_NOT_BEARING = ("record", "batch", "light", "mixed", "overlap", "registry", "workers", "peft")
_ABSENT = object()


@dataclass(frozen=True)
class Settings:
    """Parsed ``model_args``; attributes as in :data:`MODEL_ARGS`, ``hf`` holds those of lm-eval's ``hf``."""

    engine: str
    adapt: str
    peft: Path | None
    experts: tuple[str, ...] | None
    registry: str | None
    alpha: tuple[float, ...] | None
    control: Control
    control_seed: int
    shots: int
    adapt_seed: int
    metric: str | None
    filter: str | None
    search: str
    population: int
    generations: int
    elite: float
    light: bool
    budget: Budget
    economy: Economy
    preselect: int | None
    per: Per
    space: Space
    normalise: Normalise
    rescale: Literal["none", "nuclear"]
    dispatch: Literal["likelihood", "generate"]
    threshold: float | Literal["calibrate"]
    fallback: Literal["mixture", "base"]
    layers: tuple[int, ...] | None
    rank: int | None
    transfer: str
    moe: str
    overlap: Literal["mark", "refuse"]
    record: Path | None
    batch: int | None
    mixed: Literal["exact", "always", "never"]
    workers: int | None
    hf: Mapping[str, Any]

    def options(self) -> Options:
        """What the strategy is told."""
        return Options(
            alpha=self.alpha,
            search=self.search,
            budget=self.budget,
            economy=self.economy,
            preselect=self.preselect,
            population=self.population,
            generations=self.generations,
            elite=self.elite,
            per=self.per,
            space=self.space,
            normalise=self.normalise,
            rescale=self.rescale,
            rank=self.rank,
            dispatch=self.dispatch,
            threshold=None if self.threshold == "calibrate" else self.threshold,
            fallback=self.fallback,
            seed=self.adapt_seed,
        )

    def bearing(self) -> dict[str, Any]:
        """The settings that bear on an adaptation, resolved, as JSON; experts are told by digest elsewhere."""
        values = {}
        for name in MODEL_ARGS:
            if name not in (*_NOT_BEARING, "experts") and without_effect(name, vars(self)) is None:
                value = getattr(self, name)
                values[name] = (
                    list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Budget) else value
                )
        return values


def without_effect(name: str, values: Mapping[str, Any]) -> str | None:
    """The setting under which an argument changes nothing, such as ``adapt=mix``; None where it has an effect."""
    strategies = MODEL_ARGS[name].strategies
    if strategies and values["adapt"] not in strategies:
        return f"adapt={values['adapt']}"
    if name == "elite" and values["search"] != "cem":
        return f"search={values['search']}"
    if name in ("threshold", "fallback") and values["dispatch"] == "generate":
        return "dispatch=generate"
    if name == "fallback" and values["threshold"] == 0:
        return "threshold=0"
    return "control=none" if name == "control_seed" and values["control"] == "none" else None


def hf_arguments(engine: str = "hf") -> list[str]:
    """The named parameters of lm-eval's ``HFLM``, without those that t2 gives another meaning.

    With ``hf-multimodal`` those of ``HFMultimodalLM`` as well; with ``vllm`` those of ``VLLM`` and of vLLM instead.

    Raises:
        DependencyError: ``vllm`` is not installed.
    """
    from t2.harness.base import engine_class, vllm_module

    if engine == "vllm":
        return [name for name in vllm_module().arguments() if name not in MODEL_ARGS]
    classes = dict.fromkeys((engine_class(engine), engine_class("hf")))
    parameters = [p for kind in classes for p in inspect.signature(kind.__init__).parameters.values()]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
    return [name for name in dict.fromkeys(named) if name not in MODEL_ARGS]


def check_hf_args(given: Mapping[str, Any], where: str) -> None:
    """Refuse what is neither an argument of lm-eval's ``hf`` nor passed on to ``from_pretrained``.

    Args:
        given: arguments of ``hf``, by name.
        where: what they were given to, for the message.

    Raises:
        ArgumentError: an argument that does not exist, or that only ``--model t2`` takes.
    """
    allowed = [*hf_arguments(), *FROM_PRETRAINED]
    for name in given:
        if name == "engine":
            raise ArgumentError(f"{where}: engine is for lm_eval --model t2; here the model runs in transformers")
        if name in MODEL_ARGS:
            raise ArgumentError(f"{where}: {name} is an argument of lm_eval --model t2, not of the base model")
        if name not in allowed:
            raise ArgumentError(f"{where}: {name} does not exist{nearest(str(name), allowed)}")


def split_args(text: str) -> dict[str, Any]:
    """Split ``key=value,…`` as lm-eval does, but keep names and arguments of t2 as text.

    lm-eval parses ``none`` as None, ``007`` as 7 and ``1e5`` as 100000.0, even if it is the name of a filter, an expert
    or a revision.
    """
    found: dict[str, Any] = dict(simple_parse_args_string(text))
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        value = value.strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        if equals and not quoted and (name in MODEL_ARGS or (name in _NAMES and found.get(name) is not None)):
            found[name] = value
    return found


def parse_args(given: Mapping[str, Any]) -> Settings:
    """Read ``model_args``, whichever of lm-eval's parsers they come from.

    lm-eval turns ``none`` into None, digits into numbers and ``true`` into a bool before it hands them over, on some
    paths. Both forms are accepted, except a number or a bool for a name, since its original text is lost.

    Raises:
        ArgumentError: an argument that does not exist, a value that is not allowed, or two that contradict each other.
    """
    engine = str(given.get("engine") or "hf")
    allowed = [*MODEL_ARGS, *hf_arguments(engine), *(FROM_PRETRAINED if engine != "vllm" else ("device",))]
    for name in given:
        if name not in allowed and name in (_VLLM if engine != "vllm" else [*hf_arguments(), *FROM_PRETRAINED]):
            other = "vllm" if engine != "vllm" else "hf"
            raise ArgumentError(f"model_args: {name} is for engine={other}, not for engine={engine}; leave it out")
        if name not in allowed and name in hf_arguments("hf-multimodal"):
            raise ArgumentError(
                f"model_args: {name} is for engine=hf-multimodal, not for engine={engine}; leave it out"
            )
        if name not in allowed:
            raise ArgumentError(f"model_args: {name} does not exist{nearest(str(name), allowed)}")
    for name in _NAMES:
        _check_text(name, given.get(name))
    values = {name: _read(name, spec, given.get(name, _ABSENT)) for name, spec in MODEL_ARGS.items()}
    if values["elite"] == 0:
        raise ArgumentError("model_args: elite=0 must lie above 0")
    for name, spec in MODEL_ARGS.items():
        why = without_effect(name, values)
        # What is given as it is by default may stay in a command line that goes through strategies.
        if why is not None and values[name] != spec.default:
            raise ArgumentError(_idle(name, why, given[name]))
    if values["light"]:
        values["shots"] = values["shots"] if given.get("shots") is not None else 3
        values["generations"] = values["generations"] if given.get("generations") is not None else 10
    settings = Settings(**values, hf={name: value for name, value in given.items() if name not in MODEL_ARGS})
    _agree(settings)
    return settings


def _agree(settings: Settings) -> None:
    names = settings.experts
    if settings.adapt == "peft":
        if settings.peft is None:
            raise ArgumentError("model_args: adapt=peft needs peft=, the folder of an adapter of PEFT")
        if settings.engine != "hf":
            raise ArgumentError(f"model_args: adapt=peft is for engine=hf, not for engine={settings.engine}")
        if settings.hf.get("delta"):
            raise ArgumentError("model_args: delta and adapt=peft both change the base model; leave one of them out")
    if settings.adapt == "expert" and names is not None and len(names) != 1:
        raise ArgumentError(f"model_args: adapt=expert applies one expert, experts={'+'.join(names)} are {len(names)}")
    if settings.adapt == "auto" and settings.shots < 2:
        raise ArgumentError("model_args: adapt=auto judges by docs that nothing was fitted on; give shots=2 or more")
    if settings.alpha is not None:
        if names is None:
            raise ArgumentError("model_args: alpha needs experts=, which name what it multiplies")
        if len(settings.alpha) != len(names):
            raise ArgumentError(
                f"model_args: alpha has {len(settings.alpha)} coefficients for the {len(names)} experts "
                f"{'+'.join(names)}; give one for each"
            )
    if settings.record is not None and settings.record.is_dir():
        raise ArgumentError(f"model_args: record={settings.record} is a folder; name a file")


def _idle(name: str, why: str, value: Any) -> str:
    meant = "adapt=" + " or ".join(MODEL_ARGS[name].strategies)
    if not why.startswith("adapt"):
        meant = {
            "elite": "search=cem",
            "threshold": "dispatch=likelihood",
            "fallback": "dispatch=likelihood with a threshold above 0",
        }.get(name, "control=shuffle or random")
    return f"model_args: {name}={str(value)[:60]} has no effect with {why}, it is for {meant}; leave it out"


def _read(name: str, spec: ArgSpec, value: Any) -> Any:
    if spec.kind == "count" and (value is None or str(value).lower() == "none"):
        return None
    if spec.kind == "budget" and value is not _ABSENT:
        return NO_BUDGET if value is None or str(value).lower() == "none" else _budget(value)
    if value is _ABSENT:
        return spec.default
    if spec.kind in ("integer", "number", "numbers", "layers", "flag") and str(value).lower() == "none":
        return spec.default
    if value is None:
        return "none" if spec.kind == "label" or (spec.kind == "choice" and "none" in spec.values) else spec.default
    match spec.kind:
        case "choice":
            return _choice(name, spec, value)
        case "integer" | "number" | "count":
            return _number(name, spec, value)
        case "level":
            return str(value) if str(value) in spec.values else float(_number(name, spec, value))
        case "flag":
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
                return str(value).lower() in ("true", "1", "yes")
            raise ArgumentError(f"model_args: {name}={value} must be true or false")
        case "text" | "label":
            _check_text(name, value)
            return str(value)
        case "file":
            _check_text(name, value)
            return Path(str(value)).expanduser()
        case "names":
            return _names(name, value)
        case "numbers":
            return tuple(float(_number(name, spec, part)) for part in _parts(value))
        case "budget":
            return spec.default
        case "layers":
            return tuple(parse_layers("+".join(str(part) for part in _parts(value))))


def _budget(value: Any) -> Budget:
    try:
        return Budget.parse(str(value))
    except ArgumentError as error:
        raise ArgumentError(f"model_args: {error}") from None


def _choice(name: str, spec: ArgSpec, value: Any) -> str:
    text = str(value)
    if text in spec.values:
        return text
    raise ArgumentError(f"model_args: {name}={text} is not a value of it{nearest(text, spec.values)}")


def _number(name: str, spec: ArgSpec, value: Any) -> int | float:
    whole = spec.kind in ("integer", "count")
    wanted = " or ".join(["a whole number" if whole else "a number", *spec.values])
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"model_args: {name}={str(value)[:60]} must be {wanted}") from None
    if (spec.low is not None and number < spec.low) or (spec.high is not None and number > spec.high):
        bounds = f"at least {spec.low:g}" + ("" if spec.high is None else f" and at most {spec.high:g}")
        raise ArgumentError(f"model_args: {name}={value} must be {bounds}")
    if not whole:
        return number
    try:
        return int(value)  # a seed may exceed what a float holds exactly
    except ValueError:
        return int(number)


def _names(name: str, value: Any) -> tuple[str, ...]:
    parts = _parts(value)
    for part in parts:
        if not isinstance(part, str) or not part.strip():
            raise ArgumentError(
                f"model_args: {name}={value} must be names joined by +; a name starts with a letter, or is in quotes "
                f"(lm-eval reads {part!r})"
            )
    found = tuple(part.strip() for part in cast("Sequence[str]", parts))
    for part in found:
        if found.count(part) > 1:
            raise ArgumentError(f"model_args: {name} names {part} twice")
    return found


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, bool | int | float):
        raise ArgumentError(
            f"model_args: {name} must be a text, but lm-eval parsed it as {value!r}; write it in quotes: {name}='…'"
        )


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    return value.split("+") if isinstance(value, str) else [value]
