"""From prompts to experts by domain: what ``adapt=prompt`` and ``adapt=classifier`` share.

The model is asked which domain a prompt is of (:mod:`t2.adapters.strategies.question`), "others" standing for the base.
By likelihood the answer is a posterior over the labels. Held-out prompts of known domain give its temperature and the
confidence below which a decision does not stand; such a prompt gets the mixture of all experts by their posteriors, or
the base. Transformer², section 3.2 A and B.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.expert import Expert, Z
from t2.adapters.strategies.base import Choice, DomainPrompts, Job, Memory, Plan
from t2.adapters.strategies.calibration import fit_temperature, fit_threshold, tenths
from t2.adapters.strategies.mixing import choose
from t2.adapters.strategies.question import OTHERS, parse, question
from t2.core.errors import ArgumentError
from t2.core.record import Calibration

_ANSWER_TOKENS = 16
"""Room for a generated answer, which is to be one word."""


@dataclass(frozen=True)
class Asked:
    """Who is asked, and among which labels.

    Attributes:
        labels: the domains, in the order of the question.
        z: the classifier's; None asks the base.
        prior: take off each label's log-likelihood after an empty text. A model that was not trained on the question
            prefers some labels whatever it is asked (contextual calibration, Zhao et al. 2021, arXiv 2102.09690); one
            that was has learned what to prefer.
        templated: put the question into the chat template; None does as the run does.
        name: tells one asked from another.
    """

    labels: tuple[str, ...]
    z: Z | None = None
    prior: bool = True
    templated: bool | None = None
    name: str = ""


@dataclass(frozen=True)
class Route:
    """Where prompts go.

    Attributes:
        choices: the distinct mixtures.
        rows: for each prompt the index of its mixture.
        named: for each prompt the label that was named for it.
        below: for each prompt whether its confidence lies below the threshold.
        calibration: what the decisions rest on.
    """

    choices: tuple[Choice, ...]
    rows: tuple[int, ...]
    named: tuple[str, ...]
    below: tuple[bool, ...]
    calibration: Calibration


def asked_of(experts: Sequence[Expert], classifier: Expert | None) -> Asked:
    """Who is asked: the classifier, else the base model among the domains of the experts.

    Raises:
        ArgumentError: an expert has no domain, or one that the classifier has no label for.
    """
    strategy = "prompt" if classifier is None else "classifier"
    for expert in experts:
        if not expert.domain:
            raise ArgumentError(f"adapt={strategy} needs experts with a domain, {expert.name} has none")
        if expert.domain == OTHERS:
            raise ArgumentError(f"expert {expert.name}: the domain 'others' stands for the base model")
    if classifier is None:
        return Asked((*sorted({str(expert.domain) for expert in experts}), OTHERS))
    manifest = classifier.manifest
    for expert in experts:
        if expert.domain not in manifest.labels:
            raise ArgumentError(
                f"expert {expert.name} is for {expert.domain}, which is no label of the classifier {manifest.name} "
                f"({', '.join(manifest.labels)}); leave it out, or train a classifier that names {expert.domain}"
            )
    templated = bool(manifest.training.get("apply_chat_template", False))
    return Asked(manifest.labels, classifier.z, prior=False, templated=templated, name=classifier.digest)


def route(job: Job, prompts: Sequence[str]) -> Route:
    """Send prompts to experts.

    Args:
        job: experts, classifier, options and held-out prompts; its own prompts are not looked at.
        prompts: texts without few-shot examples or template.

    Raises:
        ArgumentError: the experts do not fit, see :func:`asked_of`.
    """
    asked = asked_of(job.experts, job.classifier)
    labels = asked.labels
    alone = [_alone(job, label) for label in labels]
    held_out = _held_out(job, labels)
    texts = [text for text, _ in held_out.prompts]
    right = [labels.index(domain) for _, domain in held_out.prompts]
    if job.options.dispatch == "generate":
        known_names, _ = _generated(job, asked, texts, _kept(job))
        own, unparsed = _generated(job, asked, prompts, job.memory)
        calibration = _judged(asked, held_out, known_names).model_copy(update={"unparsed": sum(unparsed)})
        return _compact(alone, own, labels, own, (False,) * len(own), calibration)
    # Apart, so that no answer about a prompt depends on whether those about the held-out ones are kept.
    known = _asked(job, asked, ["", *texts] if asked.prior else texts, _kept(job))
    scores = torch.cat([known, _asked(job, asked, prompts, job.memory)])
    if asked.prior:
        scores = scores[1:] - scores[0]
    known = scores[: len(texts)]
    temperature = fit_temperature(known, right) if texts else 1.0
    posteriors = torch.softmax(scores / temperature, dim=1)
    confidences = [max(row) for row in posteriors.tolist()]
    named = [int(row.argmax()) for row in scores]
    threshold = job.options.threshold
    if threshold is None:
        hits = [guess == truth for guess, truth in zip(named, right, strict=False)]
        threshold = fit_threshold(confidences[: len(texts)], hits) if texts else 0.0
    calibration = _judged(asked, held_out, named[: len(texts)])
    choices, rows, below = list(alone), [], []
    for i in range(len(texts), len(scores)):
        below.append(confidences[i] < threshold)
        if below[-1]:
            choices.append(_fallback(job, labels, posteriors[i].tolist()))
        rows.append(len(choices) - 1 if below[-1] else named[i])
    calibration = calibration.model_copy(
        update={"temperature": temperature, "threshold": threshold, "below": sum(below)}
    )
    return _compact(choices, rows, labels, named[len(texts) :], tuple(below), calibration)


def questions(job: Job) -> int:
    """How many held-out prompts a dispatch asks about, besides those that it sends to experts.

    Raises:
        ArgumentError: the experts do not fit, see :func:`asked_of`.
    """
    return len(_held_out(job, asked_of(job.experts, job.classifier).labels).prompts)


def _held_out(job: Job, labels: Sequence[str]) -> DomainPrompts:
    given = job.held_out(labels, job.classifier) if job.held_out is not None else DomainPrompts()
    return DomainPrompts(
        tuple((text, domain) for text, domain in given.prompts if domain in labels),
        {domain: source for domain, source in given.sources.items() if domain in labels},
    )


def plan(job: Job) -> Plan:
    """The plan for a job's prompts: a choice per label or mixture of labels; several experts of a domain are averaged.

    Raises:
        ArgumentError: see :func:`asked_of`.
    """
    found = route(job, job.prompts)
    counts = Counter(found.named)
    dispatch = {label: counts[label] for label in found.calibration.labels}
    note = "prompts by domain: " + ", ".join(f"{count} {label}" for label, count in dispatch.items() if count)
    if found.calibration.below:
        instead = "the posterior mixture" if job.options.fallback == "mixture" else "the base"
        note += f"; {found.calibration.below} below the threshold {found.calibration.threshold:.2f} get {instead}"
    if found.calibration.unparsed:
        note += f"; {found.calibration.unparsed} answers name no domain"
    return Plan(found.choices, found.rows, note, dispatch=dispatch, calibration=found.calibration)


def _alone(job: Job, label: str) -> Choice:
    """The mean of the experts of a domain; the base where it has none."""
    return _mixture(job, {label: 1.0})


def _fallback(job: Job, labels: Sequence[str], posterior: Sequence[float]) -> Choice:
    if job.options.fallback == "base":
        return Choice()
    return _mixture(job, dict(zip(labels, (tenth / 10 for tenth in tenths(posterior)), strict=True)))


def _mixture(job: Job, shares: Mapping[str, float]) -> Choice:
    """Each domain's share to its experts in equal parts, and to the base what is left: the coefficients sum to 1."""
    members = Counter(expert.domain for expert in job.experts)
    alpha = [shares.get(str(expert.domain), 0.0) / members[expert.domain] for expert in job.experts]
    base = sum(share for label, share in shares.items() if label not in members)
    return choose(job, [alpha], base) if any(alpha) else Choice()


def _compact(
    choices: Sequence[Choice],
    rows: Sequence[int],
    labels: Sequence[str],
    named: Sequence[int],
    below: tuple[bool, ...],
    calibration: Calibration,
) -> Route:
    """The route with equal mixtures counted as one."""
    places: dict[tuple[tuple[str, float], ...], int] = {}
    kept: list[Choice] = []
    for choice in choices:
        if (key := tuple(sorted(choice.alpha.items()))) not in places:
            places[key] = len(kept)
            kept.append(choice)
    index = [places[tuple(sorted(choice.alpha.items()))] for choice in choices]
    return Route(tuple(kept), tuple(index[row] for row in rows), tuple(labels[i] for i in named), below, calibration)


def _judged(asked: Asked, held_out: DomainPrompts, guesses: Sequence[int]) -> Calibration:
    """What the held-out prompts were named, beside what they are."""
    confusion = {label: dict.fromkeys(asked.labels, 0) for label in asked.labels if label in held_out.sources}
    for (_, domain), guess in zip(held_out.prompts, guesses, strict=True):
        confusion[domain][asked.labels[guess]] += 1
    hits = sum(row[label] for label, row in confusion.items())
    return Calibration(
        labels=asked.labels,
        docs=len(held_out.prompts),
        docs_digest=held_out.digest(),
        sources=dict(held_out.sources),
        accuracy=hits / len(held_out.prompts) if held_out.prompts else None,
        confusion=confusion,
    )


def _kept(job: Job) -> Memory:
    return job.memory if job.calibrations is None else job.calibrations


def _asked(job: Job, asked: Asked, texts: Sequence[str], memory: Memory) -> torch.Tensor:
    """Log-likelihoods of the labels, shape (texts, labels): those in memory, and one forward pass for each other."""
    keys: dict[str, tuple[str, str]] = {}
    new: dict[tuple[str, str], list[ScoreRequest]] = {}
    for text in dict.fromkeys(texts):
        context = _render(job, asked, text)
        pairs = [job.encode_pair(context, f" {label}") for label in asked.labels]
        keys[text] = key = (asked.name, _digest("likelihood", pairs))
        if key not in memory:
            new[key] = [ScoreRequest(tuple(left), tuple(right)) for left, right in pairs]
    if new:
        requests = [request for group in new.values() for request in group]
        with job.engine.applied(asked.z):
            scored = job.engine.score(requests, progress=_progress(job))
        width = len(asked.labels)
        found = [tuple(one.loglikelihood for one in scored[i : i + width]) for i in range(0, len(scored), width)]
        memory.update(zip(new, found, strict=True))
    return torch.tensor([memory[keys[text]] for text in texts]).view(len(texts), len(asked.labels))


def _digest(kind: str, tokens: object) -> str:
    """A short name of what was asked: of the tokens, which hold the labels and the template."""
    return hashlib.sha256(f"{kind} {tokens!r}".encode()).hexdigest()[:32]


def _generated(job: Job, asked: Asked, texts: Sequence[str], memory: Memory) -> tuple[list[int], list[bool]]:
    """The label that the model's own answer names for each text, and whether it names none, which counts as others.

    Raises:
        ArgumentError: the labels of the classifier do not have "others".
    """
    if OTHERS not in asked.labels:
        raise ArgumentError(
            f"dispatch=generate needs the label 'others' for answers that name no domain; the classifier has "
            f"{', '.join(asked.labels)}: use dispatch=likelihood"
        )
    keys: dict[str, tuple[str, str]] = {}
    new: dict[tuple[str, str], GenerateRequest] = {}
    for text in dict.fromkeys(texts):
        context = tuple(job.encode_pair(_render(job, asked, text), f" {asked.labels[0]}")[0])
        keys[text] = key = (asked.name, _digest("generate", [context, asked.labels]))
        if key not in memory:
            new[key] = GenerateRequest(context, _ANSWER_TOKENS, ("\n",), {"do_sample": False})
    if new:
        with job.engine.applied(asked.z):
            answers = job.engine.generate(list(new.values()), progress=_progress(job))
        named = [parse(job.decode(answer.tokens), asked.labels) for answer in answers]
        memory.update((key, (-1.0 if x is None else asked.labels.index(x),)) for key, x in zip(new, named, strict=True))
    found = [int(memory[keys[text]][0]) for text in texts]
    others = asked.labels.index(OTHERS)
    return [others if label < 0 else label for label in found], [label < 0 for label in found]


def _render(job: Job, asked: Asked, text: str) -> str:
    asks = question(text, asked.labels)
    if asked.templated is None:
        return job.render(asks)
    return job.template(asks) if asked.templated else asks


def _progress(job: Job) -> str | None:
    return f"{job.task}: asking for domains" if job.progress else None
