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

from app.train.data import Row, read_rows
from app.train.evaluation import Evaluation
from app.train.floors import naive_bayes
from benchmarks.quality.tasks import TASKS, StudyTask

Cell = dict[str, Any]
TOLD = ("zero_shot", "few_shot")  # nothing is trained
MODEL_CHANGING = ("lora", "full")


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
    columns = [*(m for m in TOLD if m in methods), *ours, *(m for m in MODEL_CHANGING if m in methods)]
    rows, ratios, costs = [], [], defaultdict(list)
    for name, task in TASKS.items():
        if name not in cells:
            continue
        whole = read_rows(arguments.data / name / "test.jsonl", references=True)
        train = [(row.input, row.target) for row in task.splits(arguments.data).train]
        numbers = {len(cell["answers"]) for of_method in cells[name].values() for cell in of_method}
        if len(numbers) != 1:
            raise SystemExit(f"{name}: cells answered {sorted(numbers)} rows; only equal ones can be compared")
        test = whole[: numbers.pop()]
        for m, own in cells[name].items():
            if len(passes := {cell.get("epochs") for cell in own}) > 1:
                raise SystemExit(f"{name} by {m}: cells had {sorted(map(str, passes))} passes; run them anew")
        inputs = [row.input for row in test]
        for cell in (cell for of_method in cells[name].values() for cell in of_method):
            scores = evaluation(task, test, cell["method"], cell["answers"]).scores
            told = {key: value for key, value in cell.items() if key not in ("answers", "recipe")}
            kept_cells.append(told | {"scores": scores})
        floor = naive_bayes(train, inputs) if task.classify else inputs
        kept = {method: chosen(cells[name][method]) for method in columns if cells[name].get(method)}
        found = {m: [evaluation(task, test, m, cell["answers"]) for cell in own] for m, own in kept.items()}
        means = {m: statistics.mean(score(one, task) for one in own) for m, own in found.items()}
        line = [name, task.score, str(len(test)), f"{score(evaluation(task, test, 'floor', floor), task):.1f}"]
        line += [f"{means[m]:.1f}" if m in found else "" for m in columns]
        mine = [cell for m in ours if m in kept for cell in kept[m]]
        if mine and "full" in found:
            best = chosen_method(mine)
            against = found[best][0].compare(found["full"][0], only=(task.score,))[task.score]
            scale = 1 if task.score == "bleu" else 100
            low, high = (scale * bound for bound in against.interval)
            ratios.append(means[best] / means["full"])
            line += [best, f"{100 * ratios[-1]:.1f}", f"{low:+.1f} to {high:+.1f}"]
        rows.append(line + [""] * (4 + len(columns) + 3 - len(line)))
        for method, cell in ((method, cell) for method, own in kept.items() for cell in own):
            if "bytes" in cell:
                costs[method].append((cell["bytes"], cell["epochs"], cell["steps"], cell["train_seconds"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(kept_cells, indent=1) + "\n", encoding="utf-8")
    extra = ["best of ours", "% of full", "95 % of the difference, first seed"]
    print(table(["task", "score", "rows", "floor", *columns, *extra], rows))
    if ratios:
        print(f"\nBest of ours by full fine-tuning, mean of {len(ratios)} tasks: {100 * statistics.mean(ratios):.1f} %")
    medians = [
        [m, *(f"{statistics.median(cost[i] for cost in costs[m]):,.0f}" for i in range(4))]
        for m in columns
        if m in costs
    ]
    print("\nMedian over the tasks:\n")
    print(table(["method", "bytes a task", "passes, at most", "steps", "seconds of training"], medians))


if __name__ == "__main__":
    main()
