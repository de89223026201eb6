"""The configuration of one training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from t2.core.digests import digest_of
from t2.core.errors import ArgumentError, nearest

ObjectiveName = Literal["auto", "expected-reward", "reinforce", "next-token"]
RewardName = Literal["outcome", "tests", "number", "overlap"]
NormaliseName = Literal["auto", "none", "tokens", "chars"]
BaselineName = Literal["none", "mean", "rloo"]
SelectName = Literal["score", "reward"]
UpdateName = Literal["batch", "epoch"]
ScheduleName = Literal["cosine", "constant"]
ParametrisationName = Literal["direct", "sigmoid"]
RescaleName = Literal["auto", "none", "nuclear"]
KindName = Literal["expert", "classifier"]
TargetsName = Literal["mlp", "attn", "all", "qv"]
MethodName = Literal["svf", "lora", "dora", "ia3"]
MoeName = Literal["refuse", "skip"]
CheckpointingName = Literal["auto", "on", "off"]

METHODS: tuple[str, ...] = get_args(MethodName)
TARGETS: tuple[str, ...] = get_args(TargetsName)
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
NORMALISES: tuple[str, ...] = get_args(NormaliseName)
BASELINES: tuple[str, ...] = get_args(BaselineName)
SELECTS: tuple[str, ...] = get_args(SelectName)
KINDS: tuple[str, ...] = get_args(KindName)
REWARDS: tuple[str, ...] = get_args(RewardName)
UPDATES: tuple[str, ...] = get_args(UpdateName)
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
PARAMETRISATIONS: tuple[str, ...] = get_args(ParametrisationName)
RESCALES: tuple[str, ...] = get_args(RescaleName)
CHECKPOINTING: tuple[str, ...] = get_args(CheckpointingName)

_OF_VALIDATION = ("train_docs", "validation_docs", "validate_every", "patience", "select")
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout")

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,99}$")]
Count = Annotated[int, Field(ge=1)]


def _one_or_more(value: Any) -> Any:
    """``0.1`` and ``[0.1]`` are the same λ, ``"0,0.1"`` and ``[0, 0.1]`` the same two."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


Lambda = Annotated[float, Field(ge=0)]
Lambdas = Annotated[Lambda | Annotated[tuple[Lambda, ...], Field(min_length=1)], BeforeValidator(_one_or_more)]


class TrainConfig(BaseModel):
    """What decides which expert comes out: with equal configurations the same machine makes the same file.

    Defaults are those of Transformer² (arXiv 2501.06252, appendix A.1) where it gives one: AdamW at 2e-3 with cosine
    decay, clipping at 1e-3, 256 documents a step, no KL penalty, equal halves for training and validation. The paper
    has no baseline; ``mean`` is the default here, since it is unbiased and lowers the variance.

    Attributes:
        task: an lm-eval task.
        name: the expert's name; letters, digits, ``_`` and ``-``, beginning with a letter.
        method: ``svf`` makes an expert, z; ``lora``, ``dora`` and ``ia3`` make an adapter of PEFT from the same
            documents by the same steps, to compare with.
        kind: ``expert`` answers; ``classifier`` learns a task whose documents all offer the same choices, the domains,
            and names them for ``adapt=classifier``.
        domain: what the expert is for; None takes ``metadata.t2.domain`` of the task.
        model_args: arguments of lm-eval's ``HFLM``, such as ``pretrained`` and ``dtype``; without ``pretrained`` the
            demo model.
        metric: the metric that is rewarded; None takes the task's first.
        filter: the answer filter before it; None takes the task's first.
        num_fewshot: examples in the prompt; None leaves it to the task.
        apply_chat_template: wrap prompts in the model's chat template.
        system_instruction: a system message for the prompt.
        gen_kwargs: generation arguments that replace the task's, such as ``max_gen_toks``.
        objective: ``expected-reward`` has the exact gradient over a multiple-choice document's choices, ``reinforce``
            samples answers; ``auto`` takes the first where answers are choices and the second where they are generated.
            ``next-token`` is supervised: the likelihood of the right answers' tokens.
        normalise: log-likelihood of a choice per token (``tokens``) or per character (``chars``), times the mean length
            of the document's choices, or as it is (``none``); ``auto`` is ``chars`` for the metric ``acc_norm`` and
            ``none`` otherwise.
        temperature: of the policy, over tokens or over choices; 0 rolls out the greedy answer.
        samples: answers sampled per document in a step (``reinforce``).
        reward: what the score of a generated answer is: the task's metric of it (``outcome``), or partial credit where
            that is wrong, one of :data:`t2.training.rewards.SHAPERS`.
        reward_partial: the score of a wrong answer with full partial credit, below 1, that of a right one.
        reward_format: added to the reward of an answer that has the form the task asks for.
        reward_right: reward of a score of 1.
        reward_wrong: reward of a score of 0; scores between lie on the line between.
        baseline: subtracted from rewards in ``reinforce``: ``mean`` of the step's other answers, ``rloo`` of the
            document's other answers (needs ``samples`` ≥ 2).
        kl: λ, weight of the penalty KL(policy‖base) in nats: per token of generated answers, or over the choices.
            Several make one run each; validation chooses among them.
        steps: gradient steps.
        update: a step's documents: a ``batch``, or with ``epoch`` the whole training half.
        batch: documents in a step of a batch.
        learning_rate: of AdamW, after warmup.
        warmup: steps of linear warmup.
        schedule: after warmup the learning rate falls to zero by half a ``cosine``, or stays ``constant``.
        decay_steps: the step at which the cosine reaches zero; None is ``steps``.
        weight_decay: of AdamW, on θ: towards z = 1, or with ``sigmoid`` towards p = ``init_mean``.
        clip: largest global norm of the gradient.
        shots: train on the documents that ``adapt=cem`` with so many ``shots`` and this seed as ``adapt_seed`` would
            see of the task, for all steps and without validation; None trains and validates on halves of the training
            documents.
        train_docs: use at most so many of the training half; None uses all.
        validation_docs: use at most so many of the validation half; None uses all.
        validate_every: steps between measurements on the validation documents.
        patience: stop after so many measurements without a new best; 0 trains all steps.
        select: what decides the best measurement: the task's ``score`` (ties by reward) or the ``reward``.
        parametrisation: ``direct``, z = 1 + θ with θ = 0 at first, or ``sigmoid``, z = max_mult·sigmoid(p) with
            p = ``init_mean`` + ``init_std``·N(0, 1) at first, as in the public code of Transformer².
        max_mult: the bound of z with ``sigmoid``; the public code's default.
        init_mean: of p.
        init_std: of p.
        rescale: ``nuclear`` multiplies z of each matrix by Σσ / Σ(σ⊙z), as the public code does; ``auto`` does so with
            ``sigmoid``.
        targets: which matrices are adapted: ``mlp``, ``attn``, ``all``, or ``qv``, projections to queries and
            values.
        layers: decoder layers to adapt, such as ``0-15+20``; None adapts all.
        moe: a base with mixture-of-experts layers: ``refuse`` it, or ``skip`` their routers and routed experts.
        rank: only the first so many components move; None lets all.
        lora_rank: of ``lora`` and ``dora``: rank of the update; this and the next two are the paper's.
        lora_alpha: the update counts ``lora_alpha / lora_rank`` times.
        lora_dropout: of the update's input, where a gradient is taken.
        micro_tokens: tokens in one forward pass; bounds memory.
        seed: of the split, the order of documents, sampled answers and the first p.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: Annotated[str, StringConstraints(min_length=1)]
    name: Name
    method: MethodName = "svf"
    kind: KindName = "expert"
    domain: str | None = None
    model_args: dict[str, Any] = Field(default_factory=dict)
    metric: str | None = None
    filter: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)

    objective: ObjectiveName = "auto"
    normalise: NormaliseName = "auto"
    temperature: Annotated[float, Field(ge=0)] = 1.0
    samples: Count = 1
    reward: RewardName = "outcome"
    reward_partial: Annotated[float, Field(ge=0, lt=1)] = 0.5
    reward_format: float = 0.0
    reward_right: float = 1.0
    reward_wrong: float = -1.0
    baseline: BaselineName = "mean"
    kl: Lambdas = 0.0

    steps: Count = 200
    update: UpdateName = "batch"
    batch: Count = 256
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: ScheduleName = "cosine"
    decay_steps: Count | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1e-3
    shots: Count | None = None
    train_docs: Count | None = None
    validation_docs: Count | None = None
    validate_every: Count = 5
    patience: Annotated[int, Field(ge=0)] = 10
    select: SelectName = "score"

    parametrisation: ParametrisationName = "direct"
    max_mult: Annotated[float, Field(gt=0)] = 1.0
    init_mean: float = 0.1
    init_std: Annotated[float, Field(ge=0)] = 0.01
    rescale: RescaleName = "auto"
    targets: TargetsName = "all"
    layers: str | None = None
    moe: MoeName = "refuse"
    rank: Count | None = None
    lora_rank: Count = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    micro_tokens: Count = 4096
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.baseline == "rloo" and self.samples < 2:
            raise ValueError("baseline=rloo compares answers to one document, so it needs samples of 2 or more")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("temperature=0 gives the greedy answer, of which there is one: leave samples at 1")
        if self.reward_right == self.reward_wrong:
            raise ValueError("reward_right equals reward_wrong, so there is nothing to learn from")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} leaves none of the {self.steps} steps")
        if self.decay_steps is not None and self.schedule == "constant":
            raise ValueError("decay_steps is where a cosine ends: give it with schedule=cosine")
        if self.decay_steps is not None and self.decay_steps < self.steps:
            raise ValueError(f"decay_steps={self.decay_steps} ends the schedule before the {self.steps} steps")
        if self.reward == "outcome" and self._differs("reward_partial"):
            raise ValueError("reward_partial has no effect with reward=outcome, which gives no partial credit")
        self._check_method()
        if self.parametrisation == "direct":
            idle = [name for name in ("max_mult", "init_mean", "init_std") if self._differs(name)]
            if idle:
                raise ValueError(f"{idle[0]} has no effect with parametrisation=direct, it is for sigmoid")
        if self.shots is not None:
            idle = [name for name in _OF_VALIDATION if self._differs(name)]
            if idle:
                raise ValueError(f"{idle[0]} has no effect with shots, which trains all steps without validation")
            if self.kind == "classifier":
                raise ValueError("kind=classifier learns from halves of its task's documents: leave shots out")
            if len(self.kls) > 1:
                raise ValueError("several values of kl are chosen among by validation, which shots does without")
        if len(set(self.kls)) < len(self.kls):
            raise ValueError(f"kl={','.join(map(str, self.kls))} names a value twice")
        return self

    def _check_method(self) -> None:
        if self.method != "svf":
            if self.kind == "classifier":
                raise ValueError(f"kind=classifier makes an expert, and method={self.method} an adapter of PEFT")
            idle = [name for name in ("rank", "parametrisation", "rescale") if self._differs(name)]
            if idle:
                raise ValueError(f"{idle[0]} has no effect with method={self.method}, it is for svf")
        if self.method not in ("lora", "dora"):
            idle = [name for name in _OF_LORA if self._differs(name)]
            if idle:
                raise ValueError(f"{idle[0]} has no effect with method={self.method}, it is for lora and dora")

    def _differs(self, field: str) -> bool:
        return bool(getattr(self, field) != type(self).model_fields[field].default)

    @property
    def kls(self) -> tuple[float, ...]:
        """Every λ to be tried."""
        return self.kl if isinstance(self.kl, tuple) else (self.kl,)

    @property
    def rescales(self) -> bool:
        """Whether z keeps the nuclear norm of each matrix."""
        return self.rescale == "nuclear" or (self.rescale == "auto" and self.parametrisation == "sigmoid")

    def told(self) -> dict[str, Any]:
        """The configuration as JSON, as files hold it.

        It does not name ``shots`` that are not given, nor of an expert what is for other methods, as before there were
        any: files keep their digests.
        """
        absent = {"method", *_OF_LORA} if self.method == "svf" else set()
        return self.model_dump(mode="json", exclude=absent if self.shots is not None else {"shots", *absent})

    def digest(self) -> str:
        """Hex SHA-256 of the configuration; a run may be resumed only under the same one."""
        return digest_of(self.told())


def make_config(where: Callable[[str], str] | None = None, **values: Any) -> TrainConfig:
    """Build a configuration from a user's values.

    Args:
        where: for a field, where its value stands, to begin an error with; None says nothing.
        values: by field.

    Raises:
        ArgumentError: an unknown field (with the nearest one), or a value out of range.
    """
    place = where if where is not None else lambda field: ""
    for key in values:
        if key not in TrainConfig.model_fields:
            raise ArgumentError(f"{place(key)}{key} is not a training option{nearest(key, TrainConfig.model_fields)}")
    for key in ("task", "name"):
        if key not in values:
            raise ArgumentError(f"training needs a {key}: give --{key}, or {key} in the configuration file")
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        what = first["msg"].removeprefix("Value error, ")
        given = f"{place(field)}{field}={values.get(field)}: " if field else ""
        raise ArgumentError(f"{given}{what[0].lower()}{what[1:]}") from error
