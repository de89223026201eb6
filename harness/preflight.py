"""Requests that lm-eval's model would refuse or fail on, refused before a search is spent on their task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs

from t2.adapters.engine.decoding import seeded
from t2.core.errors import T2Error, TaskError
from t2.harness.generation import LENGTHS, Generations, by_arguments
from t2.harness.pictures import check_pictures, has_pictures
from t2.harness.rules import HFRules, rules_of
from t2.harness.tasks import encode_pair

_TRIED_TOKENS = 2
"""Tokens of a trial answer: some arguments fail from the second on."""


def check_requests(lm: Any, tasks: Mapping[str, Task], *, tries: bool = True) -> None:
    """Refuse tasks whose requests lm-eval's model cannot answer, or whose answers cannot be scored here.

    Args:
        lm: lm-eval's own model.
        tasks: the tasks, their requests built.
        tries: what a search would come before: also generate after the shortest prompts, with arguments that the
            engine leaves to lm-eval's model, and score made-up answers.

    Raises:
        TaskError: it cannot.
    """
    for name, task in tasks.items():
        requests = list(task.instances or ())
        if not requests:
            continue
        if tries and has_pictures(task):
            check_pictures(task, lm)
        _check_tokenizer(name, lm)
        kinds: dict[str, list[Instance]] = {}
        for request in requests:
            kinds.setdefault(request.request_type, []).append(request)
        check_likelihoods(f"task {name}", lm, kinds.get("loglikelihood", []), encode=tries)
        _check_generations(name, lm, kinds.get("generate_until", []), tries)
        if tries:
            _check_scoring(name, task, requests)


def _check_tokenizer(name: str, lm: Any) -> None:
    if lm.prefix_token_id is None:
        raise TaskError(
            f"task {name}: the tokenizer has no token to begin a text with (neither bos nor eos), which lm-eval needs; "
            "give prefix_token_id="
        )


def check_likelihoods(where: str, lm: Any, requests: Sequence[Instance], *, encode: bool = True) -> None:
    """Refuse likelihoods while thinking, and texts that leave no tokens on either side or too many.

    Args:
        where: what asks, for the message.
        lm: lm-eval's own model.
        requests: (context, continuation) each.
        encode: encode whatever may have no tokens; otherwise only texts without letters, or that may be too long.

    Raises:
        TaskError: lm-eval's model cannot answer one of them.
    """
    if not requests:
        return
    if getattr(lm, "enable_thinking", False):
        raise TaskError(
            f"{where}: lm-eval computes no likelihoods with enable_thinking=True; leave it out, or generate the answers"
        )
    rules = rules_of(lm)
    if not isinstance(rules, HFRules) or len(requests[0].args) > 2:
        return
    for request in requests:
        context, continuation = (str(text) for text in request.args[:2])
        # A token holds a byte or more, and few merge across white space.
        longest = len(continuation.encode()) + len(context) - len(context.rstrip())
        apart = not encode or context[-1:].isspace() or continuation[:1].isspace()
        if apart and _has_letter(continuation) and (_has_letter(context) or not context) and longest < rules.pair - 2:
            continue
        number = "" if request.doc_id is None else f", doc {request.doc_id}"
        left, right = encode_pair(lm, context, continuation)
        if not left:
            raise TaskError(
                f"{where}{number}: the prompt {context[:100]!r} has no tokens, so lm-eval computes no likelihood after "
                "it; give add_bos_token=True, or change the prompt (of a task: its doc_to_text)"
            )
        if not right and _shares_logits(lm, context, requests):
            continue
        if not 0 < len(right) < rules.pair:
            raise TaskError(
                f"{where}{number}: the answer {continuation[:100]!r} has {len(right)} tokens, the model takes 1 to "
                f"{rules.pair - 1}; change the answers (of a task: its choices or target)"
            )


def _shares_logits(lm: Any, context: str, requests: Sequence[Instance]) -> bool:
    """Whether lm-eval takes the logits of an answer of one token after the same prompt, which do for one of none."""
    if not lm.logits_cache:
        return False
    others = dict.fromkeys(str(request.args[1]) for request in requests if request.args[0] == context)
    return any(len(encode_pair(lm, context, other)[1]) == 1 for other in others)


def _has_letter(text: str) -> bool:
    """Whether a text has an ASCII letter or digit, which no tokenizer drops."""
    return any(char.isascii() and char.isalnum() for char in text)


def _check_generations(name: str, lm: Any, requests: Sequence[Instance], tries: bool) -> None:
    rules = rules_of(lm)
    odd = next((request for request in requests if not isinstance(request.args[1], dict)), None)
    if odd is not None:
        raise TaskError(
            f"task {name}, doc {odd.doc_id}: lm-eval's model takes generation arguments as a dict, got "
            f"{odd.args[1]!r:.200}; change the task's construct_requests"
        )
    if requests and isinstance(rules, HFRules) and lm.eot_token_id is None:
        raise TaskError(
            f"task {name}: the tokenizer has no token to end a text with (eos), which lm-eval needs to generate; "
            "name another tokenizer="
        )
    tried: set[str] = set()
    for own in by_arguments(requests):
        given = dict(own[0].args[1])
        refused = f"task {name}: lm-eval's model refuses to generate with {_shown(given)}"
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, lm.max_gen_toks))
            rules.check(kwargs)
        except (TypeError, ValueError, OverflowError) as error:
            raise TaskError(
                f"{refused}: {_line(error)}; change the task's generation_kwargs or --gen_kwargs"
            ) from error
        new_tokens = int(kwargs["max_gen_toks"])
        if new_tokens >= lm.max_length and (tries or isinstance(rules, HFRules)):
            raise TaskError(
                f"task {name} asks for {new_tokens} new tokens, the model holds {lm.max_length} in all; lower "
                "max_gen_toks or raise max_length"
            )
        if not isinstance(rules, HFRules):
            continue
        if "max_length" in kwargs and len(own[0].args) == 2 and lm.model.generation_config.max_new_tokens is None:
            _check_max_length(name, lm, own, kwargs)
        if tries and not Generations(lm).same_in_batches(own):
            # Documents may differ in what cannot fail here: lengths and stop texts.
            form = repr(sorted((key, value) for key, value in given.items() if key not in (*LENGTHS, "until")))
            if form not in tried:
                tried.add(form)
                _try(lm, own, refused)


def _check_max_length(name: str, lm: Any, requests: Sequence[Instance], kwargs: Mapping[str, Any]) -> None:
    """Refuse a limit of prompt and answer together that a prompt reaches by itself."""
    room = lm.max_length - int(kwargs["max_gen_toks"])
    longest = max(len(rules_of(lm).prompt(str(request.args[0]), room)) for request in requests)
    limit = kwargs["max_length"]
    if not isinstance(limit, int) or longest >= limit:
        raise TaskError(
            f"task {name}: max_length={limit} leaves no room for an answer, the longest prompt has {longest} tokens; "
            "raise it, or use max_gen_toks"
        )


def _try(lm: Any, requests: Sequence[Instance], refused: str) -> None:
    """Generate some tokens after the shortest prompts; the model is as it was afterwards."""
    given = {key: value for key, value in requests[0].args[1].items() if key not in LENGTHS}
    given["max_gen_toks"] = _TRIED_TOKENS
    count = 1 if lm.batch_size == 1 else 2
    some = [
        replace(request, arguments=(request.args[0], dict(given), *request.args[2:]), resps=[], filtered_resps={})
        for request in sorted(requests, key=lambda request: len(str(request.args[0])))[:count]
    ]
    config = lm.model.generation_config
    kept = config.max_new_tokens, lm.batch_size_per_gpu
    try:
        config.max_new_tokens = None if kept[0] is None else _TRIED_TOKENS
        lm.batch_size_per_gpu = len(some)
        with seeded(0, lm.device):
            lm.generate_until(some, disable_tqdm=True)
    except T2Error:
        raise
    except Exception as error:  # whatever transformers or the model raises, it would raise after the search too
        told = f"{refused}: {_line(error)}"
        raise TaskError(
            f"{told}; change the task's generation_kwargs, --gen_kwargs or generation_config.json"
        ) from error
    finally:
        config.max_new_tokens, lm.batch_size_per_gpu = kept


def _check_scoring(name: str, task: Task, requests: Sequence[Instance]) -> None:
    """Refuse metrics that need a library or data which is not there, by scoring made-up answers to one doc.

    Whatever else the task's code makes of such answers says nothing.
    """
    own = [request for request in requests if request.doc_id == requests[0].doc_id]
    made_up: Any = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
    try:
        copies = [
            replace(
                request, resps=[made_up.get(request.request_type, "")] * int(request.repeats or 1), filtered_resps={}
            )
            for request in own
        ]
        for ensemble in task._filters:
            ensemble.apply(copies)
        key = next(iter(copies[0].filtered_resps))
        metrics = task.process_results(own[0].doc, [copy.filtered_resps[key] for copy in copies])
        aggregation = task.aggregation()
        for metric, value in metrics.items():
            if metric in aggregation:
                aggregation[metric]([value])
    except Exception as error:
        # Data of nltk that is not there is exactly a LookupError; the answers are made up, so others say nothing.
        if not isinstance(error, (ImportError, OSError)) and type(error) is not LookupError:
            return
        raise TaskError(
            f"task {name} cannot be scored here: {_line(error)}; install what its metrics need, or leave it out"
        ) from error


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items())[:300]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
