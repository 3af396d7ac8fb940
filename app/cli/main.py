"""The command line: its entry point, and the commands that work without a server."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from app import __version__
from app.cli import alias, ask, batch, bench, completion, doctor, errors, keys, model, tasks, values
from app.cli.output import AsJson, err, say, to_json, write, write_json
from app.cli.published import published_document, tell_published
from app.config import Settings, load_with_sources
from app.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, epilog=errors.EPILOG)
for module in (ask, batch, tasks, alias, bench, doctor):
    app.add_typer(module.app)
app.add_typer(model.app, name="model")
app.add_typer(keys.app, name="keys")

Task = Annotated[str, typer.Argument(help="Name of the task to publish to")]
_METHODS = "prompt_tuning, p_tuning, prefix_tuning, cartridge, multitask_prompt_tuning or cpt"
Data = Annotated[Path, typer.Option(help="Folder with train.jsonl (validation.jsonl, test.jsonl), or one JSONL file")]


def main() -> None:
    """Entry point: whatever goes wrong is one readable line, or with --json one document, and an exit code."""
    if completion.is_for_bash():
        completion.complete_in_bash(app)
    as_json = "--json" in itertools.takewhile(lambda argument: argument != "--", sys.argv[1:])
    try:
        code = app(standalone_mode=False)  # else typer would draw a box around wrong options
    except typer.Abort:
        say("nothing was done")
        code = errors.FAILED
    except Exception as error:
        if not errors.is_known(error):
            raise
        errors.report(error, as_json=as_json)
        code = errors.exit_code(error)
    sys.exit(code)


def _version(show: bool) -> None:
    if show:
        write(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it")] = False,
) -> None:
    """One frozen language model, many soft prompts, chosen per request.

    Settings come from options, SOFTPROMPT_* variables and a .env file in the working directory, in this order.
    """


@app.command(epilog="Example: softprompt serve --port 8080")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: name, folder, .gguf file or hub id")] = None,
    registry: Annotated[Path | None, typer.Option(help="Folder of the soft prompts")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without any key")] = False,
    metrics_compat: Annotated[str | None, typer.Option(help="vllm: /metrics by vLLM's names too")] = None,
    print_config: Annotated[bool, typer.Option(help="Print every setting and its source, secrets hidden")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --print-config: as JSON")] = False,
) -> None:
    """Serve the HTTP API."""
    settings, sources = load_with_sources(
        host=host,
        port=port,
        model=model,
        registry=registry,
        insecure=insecure or None,
        metrics_compat=metrics_compat,
    )
    if print_config:
        doctor.print_config(settings, sources, as_json=as_json)
        return
    from app.main import serve as run  # torch and transformers take seconds that --help need not

    run(settings)


@app.command(epilog="Example: softprompt train mood --data examples/data/sentiment_mixed --classify")
def train(
    task: Task,
    data: Data,
    template: Annotated[str, typer.Option(help='How {input} becomes text, e.g. "{input}\\nSentiment:"')] = "{input}\n",
    classify: Annotated[bool, typer.Option(help="The targets are labels; scores and serves /v1/classify")] = False,
    method: Annotated[str, typer.Option(help=_METHODS)] = "prompt_tuning",
    init: Annotated[str | None, typer.Option(help="Start: text, labels or vocabulary; default: by --init-text")] = None,
    init_text: Annotated[str, typer.Option(help="Instruction whose embeddings the virtual tokens start from")] = "",
    init_from: Annotated[str | None, typer.Option(help="Start from this version: task, task:7 or task@alias")] = None,
    residual: Annotated[bool, typer.Option("--residual", help="Train a network beside the prompt")] = False,
    encoder: Annotated[str, typer.Option(help="Of p_tuning: mlp or lstm")] = "mlp",
    ranks: Annotated[int, typer.Option(help="Of multitask_prompt_tuning: rank of a task's matrix")] = 1,
    for_task: Annotated[
        str | None, typer.Option(help="Of the rows' tasks the one to publish; default: the first")
    ] = None,
    frozen_tokens: Annotated[int, typer.Option(help="Of a cartridge: first tokens that stay as they are")] = 1,
    cpt_epsilon: Annotated[float, typer.Option(help="How far cpt moves a token, in an embedding's norm")] = 0.5,
    instruction: Annotated[str, typer.Option(help="What the zero-shot baseline is told; default: --init-text")] = "",
    virtual_tokens: Annotated[int | None, typer.Option(help="Length; default: 20, or that of --init-from")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Most steps to train; default: 300, or what --budget allows")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Time to train, e.g. 90s, 10m or 2h")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step")] = 16,
    learning_rate: Annotated[
        str | None, typer.Option(help="In units of what is trained; auto: try three; default: the method's")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between validations")] = 25,
    eval_rows: Annotated[int, typer.Option(help="Validation rows measured each time")] = 200,
    patience: Annotated[int, typer.Option(help="Validations without improvement before stopping")] = 6,
    seed: Annotated[int, typer.Option()] = 0,
    precision: Annotated[str, typer.Option(help="auto: products in bfloat16 where a CPU has it; or float32")] = "auto",
    max_tokens: Annotated[int | None, typer.Option(help="Default length of the answer, for generation")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Default stop string, for generation")] = None,
    description: Annotated[str, typer.Option(help="What the task does, for its manifest")] = "",
    source: Annotated[list[str] | None, typer.Option(help="Origin of the data, as key=value, e.g. licence=MIT")] = None,
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty: none")] = "latest",
    out_dir: Annotated[Path | None, typer.Option(help="Working folder; default: in the cache folder")] = None,
    baselines: Annotated[bool, typer.Option(help="Also score the base model without a soft prompt")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a soft prompt, score it on the test rows and publish it in the registry folder.

    A run that was stopped goes on where it was when started again with the same options.
    """
    settings = Settings.load()
    from app.cli.train import starting_prompt, train_and_publish
    from app.text import Template
    from app.train import Recipe
    from app.train.job import Job, Splits

    splits = Splits.read(data)
    base, started_from, initial = None, "", None
    if init_from is not None:
        if init not in (None, "prompt"):
            raise InvalidRequest("--init-from is a start of its own: no --init", param="init")
        base = model.load(settings)
        started_from, initial = starting_prompt(init_from, settings, base)
        init, virtual_tokens = "prompt", virtual_tokens or initial.shape[-2]
    if steps is None:
        steps = 300 if budget is None else 100_000
    # Recipe checks what they are
    options: dict[str, Any] = {"method": method, "init": init, "encoder": encoder, "precision": precision}
    job = Job(
        task=task,
        splits=splits,
        template=Template(values.unescape(template)),
        recipe=Recipe(
            **options,
            num_virtual_tokens=20 if virtual_tokens is None else virtual_tokens,
            init_text=init_text,
            residual=residual,
            num_ranks=ranks,
            num_frozen_tokens=frozen_tokens,
            cpt_epsilon=cpt_epsilon,
            learning_rate=values.learning_rate(learning_rate),
            budget_seconds=None if budget is None else values.seconds(budget),
            batch_size=batch_size,
            max_steps=steps,
            warmup_steps=min(15, steps - 1),
            eval_every=eval_every,
            eval_rows=eval_rows,
            patience=patience,
            seed=seed,
        ),
        labels=None,
        max_tokens=max_tokens,
        stop=[values.unescape(text) for text in stop or []],
        instruction=instruction or init_text,
        description=description,
        source=dict(values.pair(text) for text in source or []),
        command=shlex.join(["softprompt", *sys.argv[1:]]),
        started_from=started_from,
        for_task=for_task,
    )
    if classify:
        job = replace(job, labels=splits.labels(job.tasks[job.task_id] if job.tasks else None))
    work = out_dir or settings.cache_dir / "training" / task
    base = base or model.load(settings)
    published = train_and_publish(
        job, settings, base, work, alias=alias or None, baselines=baselines, console=err, initial=initial
    )
    if as_json:
        write_json(published_document(published))


@app.command("import", epilog="Example: softprompt import mood out/mood")
def import_folder(
    task: Task,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote; a manifest.json in it counts")],
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty: none")] = "latest",
    as_json: AsJson = False,
) -> None:
    """Publish a PEFT folder in the registry folder, no server needed."""
    settings = Settings.load()
    from app.cli.registry import import_folder as run

    published = run(task, folder, settings, model.load(settings), alias=alias or None)
    if as_json:
        write_json(published_document(published))
        return
    tell_published(published)


@app.command(epilog="Example: softprompt export mood:1 out/mood")
def export(
    reference: Annotated[str, typer.Argument(help="task, task:7 or task@alias")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty")],
    as_json: AsJson = False,
) -> None:
    """Write a version as the PEFT folder that it came from, no server needed."""
    settings = Settings.load()
    from app.cli.registry import export_version

    paths = [str(path) for path in export_version(reference, folder, settings, model.load(settings))]
    if as_json:
        write_json({"files": paths})
    else:
        write("\n".join(paths))


@app.command("eval", epilog="Example: softprompt eval mood:7 --against mood:5 --data rows.jsonl --report out.html")
def evaluate(
    reference: Annotated[str, typer.Argument(help="task, task:7, task@alias, or the base model's name")],
    data: Annotated[Path, typer.Option(help="JSONL rows of input and target, and of references where there are more")],
    against: Annotated[str | None, typer.Option(help="What to compare with on the same rows, as REFERENCE")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file to write: all of it to look at")] = None,
    answers: Annotated[Path | None, typer.Option(help="JSONL file to write: the answer to each row")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap intervals")] = 0,
    as_json: AsJson = False,
) -> None:
    """Score a published prompt on held-out rows, with 95 % intervals, and compare it with another.

    The base model beside a prompt is asked as that prompt is: with its template and labels.
    """
    settings = Settings.load()
    from app.cli.evaluate import check_outputs, evaluate_references
    from app.train import read_rows

    check_outputs(data, report, answers)
    rows = read_rows(data, references=True)
    names = [reference] if against is None else [reference, against]
    found = asyncio.run(evaluate_references(names, rows, settings, model.load(settings), seed=seed, console=err))
    if answers is not None:
        answers.write_text("".join(to_json(record) + "\n" for record in found.answers()), encoding="utf-8")
    if report is not None:
        report.write_text(found.page(data.name), encoding="utf-8")
    if as_json:
        write_json(found.document())
    else:
        found.tell()


@app.command(epilog="Example: softprompt calibrate mood --data validation.jsonl")
def calibrate(
    reference: Annotated[str, typer.Argument(help="task, task:7 or task@alias: a classifier")],
    data: Annotated[Path, typer.Option(help="JSONL rows of input and target; never those that it is tested on")],
    alias: Annotated[str, typer.Option(help="Alias to move to the new version; empty: none")] = "latest",
    as_json: AsJson = False,
) -> None:
    """Fit the temperature of a classifier's probabilities and publish it as a new version of the same files.

    Which label is likeliest never changes. `train --classify` has done this with its validation rows already.
    """
    settings = Settings.load()
    from app.cli.train import calibrate_reference
    from app.train import read_rows

    rows, command = read_rows(data), shlex.join(["softprompt", *sys.argv[1:]])
    published = asyncio.run(
        calibrate_reference(
            reference, rows, settings, model.load(settings), alias=alias or None, command=command, console=err
        )
    )
    found = published.version.manifest.calibration
    assert found is not None
    if as_json:
        write_json(published_document(published) | {"calibration": found.model_dump(mode="json")})
        return
    tell_published(published)
    write(
        f"temperature {found.temperature} · nll {found.nll_before} → {found.nll_after} · "
        f"ece {found.ece_before} → {found.ece_after} ({found.rows} rows)"
    )
