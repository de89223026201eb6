"""``t2 train``: train an expert on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from t2.cli.extras import needs_eval
from t2.cli.output import print_fields
from t2.core.errors import ArgumentError
from t2.training.config import BASELINES, KINDS, NORMALISES, OBJECTIVES, SELECTS, TrainConfig, make_config


def _default(field: str) -> Any:
    return TrainConfig.model_fields[field].default


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("train")(_train)


def _train(
    task: Annotated[str, typer.Option(help="The lm-eval task to learn.")],
    name: Annotated[str, typer.Option(help="The expert's name.")],
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
    reward_right: Annotated[float, typer.Option(help="Reward of a score of 1.")] = _default("reward_right"),
    reward_wrong: Annotated[float, typer.Option(help="Reward of a score of 0.")] = _default("reward_wrong"),
    baseline: Annotated[str, typer.Option(help=f"Subtracted from rewards: {', '.join(BASELINES)}.")] = _default(
        "baseline"
    ),
    kl: Annotated[float, typer.Option(help="Weight of KL(policy‖base).")] = _default("kl"),
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = _default("steps"),
    batch: Annotated[int, typer.Option(help="Documents in a step.")] = _default("batch"),
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after warmup.")] = _default("learning_rate"),
    warmup: Annotated[int, typer.Option(help="Steps of linear warmup.")] = _default("warmup"),
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, towards z = 1.")] = _default("weight_decay"),
    clip: Annotated[float, typer.Option(help="Largest global norm of the gradient.")] = _default("clip"),
    train_docs: Annotated[int | None, typer.Option(help="Most documents to train on.")] = None,
    validation_docs: Annotated[int | None, typer.Option(help="Most documents to validate on.")] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = _default("validate_every"),
    patience: Annotated[int, typer.Option(help="Stop after so many validations without a new best.")] = _default(
        "patience"
    ),
    select: Annotated[str, typer.Option(help=f"What decides the best validation: {', '.join(SELECTS)}.")] = _default(
        "select"
    ),
    targets: Annotated[str, typer.Option(help="Matrices to scale: mlp, attn, all.")] = _default("targets"),
    layers: Annotated[str | None, typer.Option(help="Layers to adapt, such as 0-15+20.")] = None,
    moe: Annotated[str, typer.Option(help="A base with mixture-of-experts layers: refuse, or skip them.")] = _default(
        "moe"
    ),
    rank: Annotated[int | None, typer.Option(help="Only the first so many components move.")] = None,
    micro_tokens: Annotated[int, typer.Option(help="Tokens in one forward pass.")] = _default("micro_tokens"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = _default("seed"),
    output: Annotated[Path | None, typer.Option(help="Folder of experts; without it T2_EXPERTS_DIR.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the expert of that name, or drop an interrupted run that differs."),
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 5,
    include_path: Annotated[Path | None, typer.Option(help="A folder of further lm-eval tasks.")] = None,
) -> None:
    """Train an expert on a task by reinforcement; an interrupted run goes on when it is given the same options."""
    with needs_eval("t2 train"):
        from lm_eval.utils import simple_parse_args_string

        from t2.training.api import train
    config = make_config(
        task=task,
        name=name,
        kind=kind,
        domain=domain,
        model_args=_pairs("--model-args", model_args, simple_parse_args_string),
        metric=metric,
        filter=answer_filter,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        gen_kwargs=_pairs("--gen-kwargs", gen_kwargs, simple_parse_args_string),
        objective=objective,
        normalise=normalise,
        temperature=temperature,
        samples=samples,
        reward_right=reward_right,
        reward_wrong=reward_wrong,
        baseline=baseline,
        kl=kl,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        train_docs=train_docs,
        validation_docs=validation_docs,
        validate_every=validate_every,
        patience=patience,
        select=select,
        targets=targets,
        layers=layers,
        moe=moe,
        rank=rank,
        micro_tokens=micro_tokens,
        seed=seed,
    )
    result = train(
        config, folder=output, overwrite=overwrite, checkpoint_every=checkpoint_every, include_path=include_path
    )
    print_fields(
        [
            ("expert", result.path),
            ("digest", result.digest),
            ("base score", f"{result.base_score:.4f}"),
            ("best score", f"{result.best_score:.4f}"),
        ]
    )


def _pairs(option: str, text: str, parse: Any) -> dict[str, Any]:
    try:
        return dict(parse(text))
    except ValueError as error:
        raise ArgumentError(f"{option}={text} is not of the form key=value,key=value") from error
