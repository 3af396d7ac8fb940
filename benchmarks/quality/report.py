"""Tables of the study from the cells that `run` and `answer` left: scores, intervals, bytes, time.

What was found is kept in one JSON file without a text of the data: of each cell its scores and which rows it had right.
Cells that are there and not in the folder of a run are told from it, so that another machine can go on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.train.bootstrap import difference, intervals
from app.train.data import Row
from app.train.evaluation import Evaluation
from app.train.floors import naive_bayes
from app.train.metrics import mean
from benchmarks.quality.tasks import TASKS, StudyTask

Cell = dict[str, Any]
TOLD = ("zero_shot", "few_shot")  # nothing is trained
MODEL_CHANGING = ("lora", "full")
UNTOLD = ("answers", "recipe", "label_scores", "labels")  # of a cell: rows of data, or long
COSTS = ("bytes", "epochs", "steps", "train_seconds")
EXTRA = ("best of ours", "% of full", "95 % of the difference, first seed")


def judged(cell: Cell, task: StudyTask, rows: Sequence[Row]) -> Cell:
    """The cell without texts: `scores`, and `right`, a 1 or 0 for each row."""
    answers = [answer.strip() for answer in cell["answers"]]
    labels = sorted({row.target for row in rows}) if task.classify else None
    found = Evaluation(name=cell["method"], rows=rows, answers=answers, labels=labels)
    right = "".join("01"[answer == row.target] for answer, row in zip(answers, rows, strict=True))
    return {key: value for key, value in cell.items() if key not in UNTOLD} | {"scores": found.scores, "right": right}


def ensemble(cells: Sequence[Cell]) -> list[str] | None:
    """The likeliest labels by the mean of the cells' probabilities. None where they are not known, or of one cell."""
    scored = [cell for cell in cells if "label_scores" in cell]
    if len(scored) < 2:
        return None
    [labels] = {tuple(cell["labels"]) for cell in scored}
    scores = torch.tensor([cell["label_scores"] for cell in scored], dtype=torch.float64)  # [cells, rows, labels]
    mean_of_cells = scores.softmax(-1).mean(0)
    return [labels[best] for best in mean_of_cells.argmax(-1).tolist()]


def is_ours(method: str) -> bool:
    return method not in (*TOLD, *MODEL_CHANGING, "ensemble")


def identity(cell: Cell) -> tuple[Any, ...]:
    return cell["task"], cell["method"], cell.get("rate"), cell["seed"]


def read_cells(out: Path) -> list[Cell]:
    """Those that a run left with answers."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    return [cell for cell in found if "answers" in cell]


def gather(answered: Sequence[Cell], known: Sequence[Cell], data: Path) -> list[Cell]:
    """Every cell without texts; with answers of a task and method, what was known of it by other passes is dropped.

    With an ensemble of our methods, all their seeds, for a task of labels: those whose validation loss is within a
    tenth of the least, as a weak member pulls the others down.
    """
    passes = {(cell["task"], cell["method"]): cell.get("epochs") for cell in answered}
    kept = [
        cell for cell in known if passes.get((cell["task"], cell["method"]), cell.get("epochs")) == cell.get("epochs")
    ]
    found = {identity(cell): cell for cell in kept}
    for name, task in TASKS.items():
        own = [cell for cell in answered if cell["task"] == name]
        test = task.splits(data).test if own else []
        methods = sorted({cell["method"] for cell in own if is_ours(cell["method"])})
        members = near_the_best([chosen([cell for cell in own if cell["method"] == method]) for method in methods])
        if together := ensemble(members):
            told = [f"{cell['method']}.s{cell['seed']}" for cell in members]
            own.append({"task": name, "method": "ensemble", "seed": 0, "members": told, "answers": together})
        elif methods:  # the one that is known was of others
            found = {key: cell for key, cell in found.items() if key[:2] != (name, "ensemble")}
        found |= {identity(cell): judged(cell, task, test[: len(cell["answers"])]) for cell in own}
    order = [*TASKS]
    return sorted(found.values(), key=lambda cell: (order.index(cell["task"]), *map(str, identity(cell)[1:])))


def chosen(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one learning rate, a seed each: that whose mean loss on the validation rows is least."""
    by_rate = defaultdict(list)
    for cell in cells:
        by_rate[cell.get("rate")].append(cell)
    return min(by_rate.values(), key=lambda own: statistics.mean(cell.get("validation_loss", math.inf) for cell in own))


def near_the_best(cells_of_methods: Sequence[Sequence[Cell]]) -> list[Cell]:
    """The cells of the methods whose mean loss on the validation rows is at most 1.1 times the least."""
    losses = [statistics.mean(cell.get("validation_loss", math.inf) for cell in own) for own in cells_of_methods]
    return [
        cell for own, loss in zip(cells_of_methods, losses, strict=True) if loss <= 1.1 * min(losses) for cell in own
    ]


def chosen_method(cells: Sequence[Cell]) -> str:
    """By the mean loss on the validation rows over the seeds."""
    losses = defaultdict(list)
    for cell in cells:
        losses[str(cell["method"])].append(float(cell["validation_loss"]))
    return min(losses, key=lambda method: statistics.mean(losses[method]))


def check_alike(name: str, cells: dict[str, list[Cell]]) -> int:
    """How many rows were answered; 0 where that is not known. Raises SystemExit where cells cannot be compared."""
    numbers = {len(cell["right"]) for own in cells.values() for cell in own if "right" in cell}
    if len(numbers) > 1:
        raise SystemExit(f"{name}: cells answered {sorted(numbers)} rows; only equal ones can be compared")
    for method, own in cells.items():
        if len(passes := {cell.get("epochs") for cell in own}) > 1:
            raise SystemExit(f"{name} by {method}: cells had {sorted(map(str, passes))} passes; run them anew")
    return numbers.pop() if numbers else 0


def score(cell: Cell, task: StudyTask) -> float:
    """What decides, in per cent."""
    return 100 * float(cell["scores"][task.score])


def against(first: Cell, second: Cell) -> str:
    """The 95 % interval of the difference on the same rows, in per cent. Empty where they are not known of both."""
    if not ("right" in first and "right" in second):
        return ""
    ours, theirs = (mean([float(one) for one in cell["right"]]) for cell in (first, second))
    low, high = intervals({"": difference(ours, theirs)}, len(first["right"]))[""]
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def floor(task: StudyTask, data: Path, rows: int) -> float:
    """Naive Bayes for labels, the input for text, in per cent."""
    splits = task.splits(data)
    test = splits.test[:rows]
    inputs = [row.input for row in test]
    train = [(row.input, row.target) for row in splits.train]
    answers = naive_bayes(train, inputs) if task.classify else inputs
    return score(judged({"method": "floor", "answers": answers}, task, test), task)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--json", type=Path, required=True, help="what is known; this run's cells are written there too"
    )
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else []
    cells = gather(read_cells(arguments.out), known, arguments.data)
    methods = sorted({cell["method"] for cell in cells})
    columns = [m for m in (*TOLD, *filter(is_ours, methods), "ensemble", *MODEL_CHANGING) if m in methods]
    rows, costs = [], defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    for name, task in TASKS.items():
        by_method = {m: own for m in columns if (own := [c for c in cells if (c["task"], c["method"]) == (name, m)])}
        if not by_method:
            continue
        count = check_alike(name, by_method) or len(task.splits(arguments.data).test)
        kept = {method: chosen(own) for method, own in by_method.items()}
        means = {method: statistics.mean(score(cell, task) for cell in own) for method, own in kept.items()}
        line = [name, task.score, str(count), f"{floor(task, arguments.data, count):.1f}"]
        line += [f"{means[m]:.1f}" if m in means else "" for m in columns]
        if mine := [cell for method, own in kept.items() if is_ours(method) for cell in own]:
            best = chosen_method(mine)
            for other in (m for m in MODEL_CHANGING if m in means):
                ratios[f"best of ours, of {other}"].append(means[best] / means[other])
                together = means.get("ensemble", means[best])
                ratios[f"ensemble or best of ours, of {other}"].append(together / means[other])
            line.append(best)
            if "full" in means:
                line += [f"{100 * means[best] / means['full']:.1f}", against(kept[best][0], kept["full"][0])]
        else:
            continue  # nothing to compare with
        rows.append(line + [""] * (4 + len(columns) + len(EXTRA) - len(line)))
        for cell in (cell for own in kept.values() for cell in own if "bytes" in cell):
            costs[cell["method"], cell["device"], cell.get("matrices", "TF32")].append([cell[cost] for cost in COSTS])
    arguments.json.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    print(table(["task", "score", "rows", "floor", *columns, *EXTRA], rows) + "\n")
    for what, found_ratios in sorted(ratios.items()):
        print(f"{what}, mean of {len(found_ratios)} tasks: {100 * statistics.mean(found_ratios):.1f} %")
    medians = [
        [*of, str(len(own)), *(f"{statistics.median(column):,.0f}" for column in zip(*own, strict=True))]
        for of, own in sorted(costs.items())
    ]
    head = ["method", "device", "matrices", "cells", "bytes a task", "passes, at most", "steps", "seconds of training"]
    print("\nMedian over the tasks:\n\n" + table(head, medians))


if __name__ == "__main__":
    main()
