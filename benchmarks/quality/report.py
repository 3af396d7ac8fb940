"""Tables of the study from the cells that `run` and `answer` left: scores, intervals, bytes, time."""

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

from app.train.data import Row, read_rows
from app.train.evaluation import Evaluation
from app.train.floors import naive_bayes
from benchmarks.quality.tasks import TASKS, StudyTask

Cell = dict[str, Any]
TOLD = ("zero_shot", "few_shot")  # nothing is trained
MODEL_CHANGING = ("lora", "full")
UNTOLD = ("answers", "recipe", "label_scores")  # of a cell: rows of data, or long
COSTS = ("bytes", "epochs", "steps", "train_seconds")


def evaluation(task: StudyTask, rows: Sequence[Row], name: str, answers: Sequence[str]) -> Evaluation:
    stripped = [answer.strip() for answer in answers]
    labels = sorted({row.target for row in rows}) if task.classify else None
    return Evaluation(name=name, rows=rows, answers=stripped, labels=labels)


def score(found: Evaluation, task: StudyTask) -> float:
    """What decides, in per cent."""
    value = found.scores[task.score]
    return value if task.score == "bleu" else 100 * value


def chosen(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one learning rate, a seed each: that whose mean loss on the validation rows is least."""
    by_rate = defaultdict(list)
    for cell in cells:
        by_rate[cell.get("rate")].append(cell)
    return min(by_rate.values(), key=lambda own: statistics.mean(cell.get("validation_loss", math.inf) for cell in own))


def chosen_method(cells: Sequence[Cell]) -> str:
    """By the mean loss on the validation rows over the seeds."""
    losses = defaultdict(list)
    for cell in cells:
        losses[str(cell["method"])].append(float(cell["validation_loss"]))
    return min(losses, key=lambda method: statistics.mean(losses[method]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def read_cells(out: Path) -> dict[str, dict[str, list[Cell]]]:
    """Those with answers, by task and method."""
    found: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if "answers" in cell:
            found[cell["task"]][cell["method"]].append(cell)
    return found


def ensemble(cells: Sequence[Cell]) -> list[str] | None:
    """The likeliest labels by the mean of the cells' probabilities. None where they are not known, or of one cell."""
    scored = [cell for cell in cells if "label_scores" in cell]
    if len(scored) < 2:
        return None
    [labels] = {tuple(cell["labels"]) for cell in scored}
    scores = torch.tensor([cell["label_scores"] for cell in scored], dtype=torch.float64)  # [cells, rows, labels]
    mean = scores.softmax(-1).mean(0)
    return [labels[best] for best in mean.argmax(-1).tolist()]


def check_alike(name: str, cells: dict[str, list[Cell]]) -> int:
    """How many rows were answered. Raises SystemExit where cells cannot be compared."""
    numbers = {len(cell["answers"]) for own in cells.values() for cell in own}
    if len(numbers) != 1:
        raise SystemExit(f"{name}: cells answered {sorted(numbers)} rows; only equal ones can be compared")
    for method, own in cells.items():
        if len(passes := {cell.get("epochs") for cell in own}) > 1:
            raise SystemExit(f"{name} by {method}: cells had {sorted(map(str, passes))} passes; run them anew")
    return numbers.pop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write every cell there too: its scores, without texts")
    arguments = parser.parse_args()
    kept_cells: list[Cell] = []
    cells = read_cells(arguments.out)
    methods = {method for found in cells.values() for method in found}
    ours = sorted(methods - {*TOLD, *MODEL_CHANGING})
    columns = [*(m for m in TOLD if m in methods), *ours, "ensemble", *(m for m in MODEL_CHANGING if m in methods)]
    rows, costs = [], defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    for name, task in TASKS.items():
        if name not in cells:
            continue
        test = read_rows(arguments.data / name / "test.jsonl", references=True)[: check_alike(name, cells[name])]
        inputs = [row.input for row in test]
        for cell in (cell for of_method in cells[name].values() for cell in of_method):
            scores = evaluation(task, test, cell["method"], cell["answers"]).scores
            kept_cells.append({key: value for key, value in cell.items() if key not in UNTOLD} | {"scores": scores})
        train = [(row.input, row.target) for row in task.splits(arguments.data).train]
        floor = naive_bayes(train, inputs) if task.classify else inputs
        kept = {method: chosen(own) for method, own in cells[name].items()}
        found = {m: [evaluation(task, test, m, cell["answers"]) for cell in own] for m, own in kept.items()}
        mine = [cell for m in ours for cell in kept.get(m, ())]
        if together := ensemble(mine):
            found["ensemble"] = [evaluation(task, test, "ensemble", together)]
        means = {m: statistics.mean(score(one, task) for one in own) for m, own in found.items()}
        line = [name, task.score, str(len(test)), f"{score(evaluation(task, test, 'floor', floor), task):.1f}"]
        line += [f"{means[m]:.1f}" if m in found else "" for m in columns]
        if mine:
            best = chosen_method(mine)
            for other in (m for m in MODEL_CHANGING if m in means):
                ratios[f"best of ours, of {other}"].append(means[best] / means[other])
                ratios[f"ensemble or best of ours, of {other}"].append(
                    means.get("ensemble", means[best]) / means[other]
                )
            line.append(best)
            if "full" in found:
                against = found[best][0].compare(found["full"][0], only=(task.score,))[task.score]
                scale = 1 if task.score == "bleu" else 100
                low, high = (scale * bound for bound in against.interval)
                line += [f"{100 * means[best] / means['full']:.1f}", f"{low:+.1f} to {high:+.1f}"]
        rows.append(line + [""] * (4 + len(columns) + 3 - len(line)))
        for cell in (cell for own in kept.values() for cell in own if "bytes" in cell):
            costs[cell["method"], cell["device"]].append([cell[cost] for cost in COSTS])
    if arguments.json:
        arguments.json.write_text(json.dumps(kept_cells, indent=1) + "\n", encoding="utf-8")
    extra = ["best of ours", "% of full", "95 % of the difference, first seed"]
    print(table(["task", "score", "rows", "floor", *columns, *extra], rows) + "\n")
    for what, found_ratios in sorted(ratios.items()):
        print(f"{what}, mean of {len(found_ratios)} tasks: {100 * statistics.mean(found_ratios):.1f} %")
    medians = [
        [method, device, str(len(own)), *(f"{statistics.median(column):,.0f}" for column in zip(*own, strict=True))]
        for (method, device), own in sorted(costs.items())
    ]
    print("\nMedian over the tasks:\n")
    print(
        table(["method", "device", "cells", "bytes a task", "passes, at most", "steps", "seconds of training"], medians)
    )


if __name__ == "__main__":
    main()
