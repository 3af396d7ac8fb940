"""The command line: its entry point, and the commands that work without a server."""

from __future__ import annotations

import asyncio
import itertools
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app import __version__
from app.cli import alias, ask, batch, bench, completion, doctor, errors, keys, model, tasks
from app.cli.output import AsJson, err, say, to_json, warn, write, write_json
from app.config import Settings, load_with_sources

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, epilog=errors.EPILOG)
for module in (ask, batch, tasks, alias, bench, doctor):
    app.add_typer(module.app)
app.add_typer(model.app, name="model")
app.add_typer(keys.app, name="keys")

Task = Annotated[str, typer.Argument(help="Name of the task to publish to")]
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
    init_text: Annotated[str, typer.Option(help="Instruction whose embeddings the virtual tokens start from")] = "",
    instruction: Annotated[str, typer.Option(help="What the zero-shot baseline is told; default: --init-text")] = "",
    virtual_tokens: Annotated[int, typer.Option(help="Length of the soft prompt")] = 20,
    steps: Annotated[int, typer.Option(help="Most steps to train")] = 300,
    batch_size: Annotated[int, typer.Option(help="Rows a step")] = 16,
    learning_rate: Annotated[float, typer.Option(help="In units of the embedding RMS")] = 0.2,
    eval_every: Annotated[int, typer.Option(help="Steps between validations")] = 25,
    eval_rows: Annotated[int, typer.Option(help="Validation rows measured each time")] = 200,
    patience: Annotated[int, typer.Option(help="Validations without improvement before stopping")] = 6,
    seed: Annotated[int, typer.Option()] = 0,
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
    from app.cli.train import train_and_publish
    from app.text import Template
    from app.train import Recipe
    from app.train.job import Job, Splits

    splits = Splits.read(data)
    job = Job(
        task=task,
        splits=splits,
        template=Template(_unescape(template)),
        recipe=Recipe(
            num_virtual_tokens=virtual_tokens,
            init_text=init_text,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_steps=steps,
            warmup_steps=min(15, steps - 1),
            eval_every=eval_every,
            eval_rows=eval_rows,
            patience=patience,
            seed=seed,
        ),
        labels=splits.labels() if classify else None,
        max_tokens=max_tokens,
        stop=[_unescape(text) for text in stop or []],
        instruction=instruction or init_text,
        description=description,
        source=dict(_pair(text) for text in source or []),
        command=shlex.join(["softprompt", *sys.argv[1:]]),
    )
    work = out_dir or settings.cache_dir / "training" / task
    base = model.load(settings)
    published = train_and_publish(job, settings, base, work, alias=alias or None, baselines=baselines, console=err)
    if as_json:
        write_json(_published(published))


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
        write_json(_published(published))
        return
    _tell(published)


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
        write_json(_published(published) | {"calibration": found.model_dump(mode="json")})
        return
    _tell(published)
    write(
        f"temperature {found.temperature} · nll {found.nll_before} → {found.nll_after} · "
        f"ece {found.ece_before} → {found.ece_after} ({found.rows} rows)"
    )


def _tell(published: Any) -> None:
    for warning in published.warnings:
        warn(warning)
    verb = "published" if published.created else "was published before as"
    write(f"{verb} {published.version.reference}  {published.version.digest}")


def _published(published: Any) -> dict[str, Any]:
    version = published.version
    return {
        "reference": version.reference,
        "digest": version.digest,
        "created": published.created,
        "warnings": list(published.warnings),
        "metrics": version.manifest.metrics,
    }


def _unescape(text: str) -> str:
    """A shell's "\\n" and "\\t" as line feed and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"{text!r} is not key=value", param_hint="--source")
    return key, value
