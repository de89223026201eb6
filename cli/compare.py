"""``t2 compare``: a grid of methods, controls and seeds on tasks, and a report on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from t2.cli.extras import needs_eval
from t2.cli.output import print_json, print_table

_METHODS = "base,expert,mix,best,prompt,classifier,cem"


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("compare")(_compare)


def _compare(
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval, with commas between.")],
    output: Annotated[Path, typer.Option(help="The folder of results and report; what it holds is not done again.")],
    model_args: Annotated[
        str, typer.Option(help="model_args that all cells have in common, such as pretrained=…,dtype=bfloat16,shots=5.")
    ] = "",
    experts: Annotated[
        str | None, typer.Option(help="Experts joined by +, as experts= takes them; else those for this base.")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folders of adapters of PEFT, with commas between; a row for each.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="Rows, some with model_args of their own: 'base,cem(shots=3|10),cem(per=expert|layer)'."),
    ] = _METHODS,
    controls: Annotated[str, typer.Option(help="none, shuffle, random.")] = "none",
    seeds: Annotated[str, typer.Option(help="Of controls and of what draws documents, such as 0,1,2.")] = "0",
    limit: Annotated[float | None, typer.Option(help="The first so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the model's chat template.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="A system message.")] = None,
    gen_kwargs: Annotated[
        str, typer.Option(help="Generation arguments over the tasks', such as max_gen_toks=128.")
    ] = "",
    batch_size: Annotated[str, typer.Option(help="Of lm-eval's model.")] = "1",
    device: Annotated[str | None, typer.Option(help="Of lm-eval's model.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of further lm-eval tasks.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run what the model writes, where a task does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Score strategies beside their controls, and report.

    The base, experts, mixtures and strategies answer the same documents; the report says what is more than chance.
    """
    with needs_eval("t2 compare"):
        from t2.harness.compare import methods as reading
        from t2.harness.compare import tables
        from t2.harness.compare.plan import Request
        from t2.harness.compare.running import compare
        from t2.harness.evaluating import RunForm
    request = Request(
        tasks=tuple(part.strip() for part in tasks.split(",")),
        methods=reading.parse_methods(methods),
        controls=reading.parse_controls(controls),
        seeds=reading.parse_seeds(seeds),
        experts=None if experts is None else tuple(experts.split("+")),
        adapters=() if adapters is None else tuple(part.strip() for part in adapters.split(",")),
        model_args=reading.parse_pairs("--model-args", model_args),
        form=RunForm(
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
            gen_kwargs=reading.parse_pairs("--gen-kwargs", gen_kwargs),
            batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
            device=device,
            include_path=None if include_path is None else str(include_path),
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        ),
    )
    report = compare(request, output, lambda text: print(f"t2: {text}", file=sys.stderr))
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    for task in report.tasks:
        print(f"{task.task}, {task.docs} documents")
        for table in (tables.scores(task), tables.choices(task), tables.controls(task)):
            if table is not None:
                print_table(table.header, table.rows)
                print()
        for note in tables.notes(task):
            print(note)
    print(f"report: {output / 'report.html'}, report.md, report.json")
