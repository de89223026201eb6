"""``t2 train``: train an expert on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from t2.cli.extras import needs_eval, pairs
from t2.cli.output import print_fields
from t2.core.errors import ArgumentError, RegistryError, T2Error
from t2.core.references import ExpertName, parse_alias, parse_name
from t2.harness.publishing import check_push
from t2.harness.publishing import push as push_file
from t2.harness.registry import registry as open_registry
from t2.registry.schemas import Version
from t2.training.config import (
    BASELINES,
    CHECKPOINTING,
    KINDS,
    METHODS,
    NORMALISES,
    OBJECTIVES,
    PARAMETRISATIONS,
    RESCALES,
    REWARDS,
    SCHEDULES,
    SELECTS,
    TARGETS,
    UPDATES,
    CheckpointingName,
    TrainConfig,
    make_config,
)


def _default(field: str) -> Any:
    return TrainConfig.model_fields[field].default


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("train")(_train)


def _train(
    context: typer.Context,
    task: Annotated[str | None, typer.Option(help="The lm-eval task to learn.")] = None,
    name: Annotated[str | None, typer.Option(help="The expert's name.")] = None,
    method: Annotated[str, typer.Option(help=f"An expert or an adapter of PEFT: {', '.join(METHODS)}.")] = _default(
        "method"
    ),
    kind: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}.")] = _default("kind"),
    domain: Annotated[str | None, typer.Option(help="What it is for; without it the task's domain.")] = None,
    model_args: Annotated[
        str,
        typer.Option(help="Arguments of lm-eval's hf model, such as pretrained=…,dtype=bfloat16; else the demo model."),
    ] = "",
    metric: Annotated[str | None, typer.Option(help="The metric to reward; without it the task's first.")] = None,
    answer_filter: Annotated[
        str | None, typer.Option("--filter", help="The answer filter; without it the task's first.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the model's chat template.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="A system message.")] = None,
    gen_kwargs: Annotated[
        str, typer.Option(help="Generation arguments over the task's, such as max_gen_toks=128.")
    ] = "",
    objective: Annotated[str, typer.Option(help=f"{', '.join(OBJECTIVES)}.")] = _default("objective"),
    normalise: Annotated[str, typer.Option(help=f"Log-likelihoods of choices: {', '.join(NORMALISES)}.")] = _default(
        "normalise"
    ),
    temperature: Annotated[float, typer.Option(help="Of the policy; 0 answers greedily.")] = _default("temperature"),
    samples: Annotated[int, typer.Option(help="Answers sampled per document.")] = _default("samples"),
    reward: Annotated[
        str, typer.Option(help=f"Score of a generated answer, with partial credit: {', '.join(REWARDS)}.")
    ] = _default("reward"),
    reward_partial: Annotated[float, typer.Option(help="Score of a wrong answer with full credit.")] = _default(
        "reward_partial"
    ),
    reward_format: Annotated[float, typer.Option(help="Added for the form asked for.")] = _default("reward_format"),
    reward_right: Annotated[float, typer.Option(help="Reward of a score of 1.")] = _default("reward_right"),
    reward_wrong: Annotated[float, typer.Option(help="Reward of a score of 0.")] = _default("reward_wrong"),
    baseline: Annotated[str, typer.Option(help=f"Subtracted from rewards: {', '.join(BASELINES)}.")] = _default(
        "baseline"
    ),
    kl: Annotated[str, typer.Option(help="Weight of KL(policy‖base); several, as 0,0.1,0.2, make a run each.")] = str(
        _default("kl")
    ),
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = _default("steps"),
    update: Annotated[str, typer.Option(help=f"A step's documents: {', '.join(UPDATES)}.")] = _default("update"),
    batch: Annotated[int, typer.Option(help="Documents in a step.")] = _default("batch"),
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after warmup.")] = _default("learning_rate"),
    warmup: Annotated[int, typer.Option(help="Steps of linear warmup.")] = _default("warmup"),
    schedule: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULES)}.")] = _default(
        "schedule"
    ),
    decay_steps: Annotated[int | None, typer.Option(help="Where the cosine ends; without it --steps.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, towards z = 1.")] = _default("weight_decay"),
    clip: Annotated[float, typer.Option(help="Largest global norm of the gradient.")] = _default("clip"),
    shots: Annotated[
        int | None, typer.Option(help="Train on the documents that a search of so many shots sees, without validation.")
    ] = None,
    train_docs: Annotated[int | None, typer.Option(help="Most documents to train on.")] = None,
    validation_docs: Annotated[int | None, typer.Option(help="Most documents to validate on.")] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = _default("validate_every"),
    patience: Annotated[
        int, typer.Option(help="Stop after so many validations without a new best; 0 never.")
    ] = _default("patience"),
    select: Annotated[str, typer.Option(help=f"What decides the best validation: {', '.join(SELECTS)}.")] = _default(
        "select"
    ),
    parametrisation: Annotated[str, typer.Option(help=f"Of z: {', '.join(PARAMETRISATIONS)}.")] = _default(
        "parametrisation"
    ),
    max_mult: Annotated[float, typer.Option(help="With sigmoid, the bound of z.")] = _default("max_mult"),
    init_mean: Annotated[float, typer.Option(help="With sigmoid, the mean of p at first.")] = _default("init_mean"),
    init_std: Annotated[float, typer.Option(help="With sigmoid, its deviation.")] = _default("init_std"),
    rescale: Annotated[str, typer.Option(help=f"Keep each matrix's nuclear norm: {', '.join(RESCALES)}.")] = _default(
        "rescale"
    ),
    targets: Annotated[str, typer.Option(help=f"Matrices to adapt: {', '.join(TARGETS)}.")] = _default("targets"),
    layers: Annotated[str | None, typer.Option(help="Layers to adapt, such as 0-15+20.")] = None,
    moe: Annotated[str, typer.Option(help="A base with mixture-of-experts layers: refuse, or skip them.")] = _default(
        "moe"
    ),
    rank: Annotated[int | None, typer.Option(help="Only the first so many components move.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Of lora and dora.")] = _default("lora_rank"),
    lora_alpha: Annotated[float, typer.Option(help="Of lora and dora; the update counts α/rank times.")] = _default(
        "lora_alpha"
    ),
    lora_dropout: Annotated[float, typer.Option(help="Of lora and dora.")] = _default("lora_dropout"),
    micro_tokens: Annotated[int, typer.Option(help="Tokens in one forward pass.")] = _default("micro_tokens"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = _default("seed"),
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A YAML file of these options; the command line goes before it.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration as such a file, and end.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of experts; without it T2_EXPERTS_DIR.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the expert of that name, or drop an interrupted run that differs."),
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Train the finished expert of that name further, from its last step.")
    ] = False,
    checkpointing: Annotated[
        str, typer.Option(help=f"Compute activations twice to save memory: {', '.join(CHECKPOINTING)}.")
    ] = "auto",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 5,
    include_path: Annotated[Path | None, typer.Option(help="A folder of further lm-eval tasks.")] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="A tracker of accelerate's, such as tensorboard; may be repeated.")
    ] = None,
    tracker_dir: Annotated[Path | None, typer.Option(help="Where trackers write; without it <output>/logs.")] = None,
    push: Annotated[
        str | None, typer.Option(help="Publish the expert in the registry under this name, such as team/math.")
    ] = None,
    push_alias: Annotated[str | None, typer.Option(help="With --push, an alias for it, such as production.")] = None,
    registry: Annotated[
        str | None, typer.Option(help="With --push, the registry: a URL or a folder; without it T2_REGISTRY_URL.")
    ] = None,
) -> None:
    """Train an expert on a task by reinforcement. An interrupted run goes on when it is given the same options."""
    with needs_eval("t2 train"):
        from t2.training.api import finished, train
        from t2.training.config_file import read_config_file, to_yaml
    given = {_FIELDS.get(name, name): value for name, value in context.params.items() if _given(context, name)}
    values = {field: value for field, value in given.items() if field in TrainConfig.model_fields}
    for field in ("model_args", "gen_kwargs"):
        if field in values:
            values[field] = pairs(f"--{field.replace('_', '-')}", values[field])
    if config_file is None:
        config = make_config(**values)
    else:
        file = read_config_file(config_file)
        config = make_config(file.where(values), **{**file.values, **values})
    if print_config:
        print(to_yaml(config), end="")
        return
    if push is not None and config.method != "svf":
        raise ArgumentError(f"--push publishes experts, and --method {config.method} makes an adapter of PEFT")
    target = _check_target(push, push_alias, registry, config.kind)
    # One that was trained and could not be published is published without another training.
    done = finished(config, output) if target is not None and not (overwrite or go_on) else None
    result = done or train(
        config,
        folder=output,
        overwrite=overwrite,
        continue_=go_on,
        checkpoint_every=checkpoint_every,
        checkpointing=cast(CheckpointingName, checkpointing),
        include_path=include_path,
        trackers=tracker or (),
        tracker_dir=tracker_dir,
    )
    print_fields(
        [
            ("expert" if config.method == "svf" else "adapter", result.path),
            ("digest", result.digest),
            *(
                [("base score", f"{result.base_score:.4f}"), ("best score", f"{result.best_score:.4f}")]
                if config.shots is None
                else []
            ),
            *([("kl", f"{result.kl:g}")] if len(config.kls) > 1 else []),
        ]
    )
    if target is not None:
        version = _publish(target, result.path, push_alias, registry)
        print_fields([("published", version.reference), ("aliases", ", ".join(version.aliases) or "-")])


def _check_target(push: str | None, alias: str | None, registry: str | None, kind: str) -> ExpertName | None:
    """Where the expert is to go, found to be writable before the training."""
    if push is None:
        for option, value in (("--push-alias", alias), ("--registry", registry)):
            if value is not None:
                raise ArgumentError(f"{option} is for --push; give that too, or leave it out")
        return None
    target = parse_name(push)
    if alias is not None:
        parse_alias(alias)
    with open_registry(registry) as client:
        check_push(client, target, kind)
    return target


def _publish(target: ExpertName, file: Path, alias: str | None, registry: str | None) -> Version:
    try:
        with open_registry(registry) as client:
            return push_file(client, target, file, alias=alias)
    except T2Error as error:
        raise RegistryError(
            f"{error}; the expert is whole in {file.parent}; publish it later by: t2 expert push {file.parent} {target}"
        ) from error


_FIELDS = {"answer_filter": "filter"}
"""Fields whose parameter has another name here."""


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and is not a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
