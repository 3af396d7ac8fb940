"""Tables of the study from the cells that `run` and `answer` left: scores, intervals, bytes, time."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU

from app.train.metrics import accuracy, macro_f1, naive_bayes, rouge_l
from benchmarks.quality.tasks import TASKS, StudyTask

RESAMPLES = 2_000
MODEL_CHANGING = ("full", "lora")


class Scored:
    """The test rows of one task, and what a list of answers to them is worth."""

    def __init__(self, task: StudyTask, data: Path) -> None:
        self.task = task
        splits = task.splits(data)
        self.rows = splits.test
        self.targets = [row.target for row in self.rows]
        self.floor = self._floor([(row.input, row.target) for row in splits.train])
        lines = (data / task.name / "test.jsonl").read_text(encoding="utf-8").splitlines()
        self.references = [json.loads(line).get("references") for line in lines if line.strip()]

    def score(self, answers: Sequence[str], chosen: Sequence[int] | None = None) -> float:
        """In per cent, of all rows or of the chosen ones."""
        rows = range(len(answers)) if chosen is None else chosen
        if self.task.score != "bleu":
            return 100 * accuracy([answers[i].strip() for i in rows], [self.targets[i].strip() for i in rows])
        most = max(len(self.references[i]) for i in rows)
        # sacrebleu wants each reference's stream as long as the answers; a row with fewer has none there.
        streams = [[_nth(self.references[i], number) for i in rows] for number in range(most)]
        return float(BLEU().corpus_score([answers[i] for i in rows], streams).score)

    def second(self, answers: Sequence[str]) -> float:
        """Macro-F1 of labels, ROUGE-L of texts, in per cent."""
        return 100 * (macro_f1 if self.task.classify else rouge_l)(answers, self.targets)

    def _floor(self, train: Sequence[tuple[str, str]]) -> list[str]:
        """Without a language model: naive Bayes, or the input itself."""
        inputs = [row.input for row in self.rows]
        return naive_bayes(train, inputs) if self.task.classify else inputs

    def difference(self, ours: Sequence[str], theirs: Sequence[str]) -> tuple[float, float]:
        """95 % interval of ours less theirs, by paired bootstrap over the rows (Koehn 2004)."""
        drawn = random.Random(0)
        number = len(self.rows)
        count = RESAMPLES if self.task.score != "bleu" else RESAMPLES // 10
        if self.task.score != "bleu":
            right = [
                (a.strip() == t.strip()) - (b.strip() == t.strip())
                for a, b, t in zip(ours, theirs, self.targets, strict=True)
            ]
            found = sorted(100 * sum(drawn.choices(right, k=number)) / number for _ in range(count))
        else:
            found = []
            for _ in range(count):
                chosen = drawn.choices(range(number), k=number)
                found.append(self.score(ours, chosen) - self.score(theirs, chosen))
            found.sort()
        return found[int(0.025 * count)], found[math.ceil(0.975 * count) - 1]


def _nth(references: Sequence[str], number: int) -> str | None:
    return references[number] if number < len(references) else None


def least_loss(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chosen on the validation rows alone."""
    return min(cells, key=lambda cell: float(cell.get("validation_loss", math.inf)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    by_task: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(arguments.out.glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if "answers" in cell:
            by_task[cell["task"]][cell["method"]].append({**cell, "name": path.stem})
    methods = sorted({method for found in by_task.values() for method in found})
    fixed = [m for m in ("zero_shot", "few_shot") if m in methods]
    ours = [m for m in methods if m not in (*fixed, *MODEL_CHANGING)]
    columns = [*fixed, *ours, *(m for m in ("lora", "full") if m in methods)]
    rows, second, ratios, costs = [], [], [], defaultdict(list)
    for name in TASKS:
        if name not in by_task:
            continue
        scored, found = Scored(TASKS[name], arguments.data), by_task[name]
        kept = {method: least_loss(found[method]) for method in columns if found.get(method)}
        scores = {method: scored.score(cell["answers"]) for method, cell in kept.items()}
        line = [name, scored.task.score, f"{scored.score(scored.floor):.1f}"]
        line += [f"{scores[m]:.1f}" if m in scores else "" for m in columns]
        mine = [kept[m] for m in ours if m in kept]
        best = least_loss(mine) if mine else None
        if best and "full" in kept:
            low, high = scored.difference(best["answers"], kept["full"]["answers"])
            ratio = scores[best["method"]] / scores["full"]
            ratios.append(ratio)
            line += [best["method"], f"{100 * ratio:.1f}", f"{low:+.1f} to {high:+.1f}"]
        rows.append(line)
        seconds = [f"{scored.second(kept[m]['answers']):.1f}" if m in kept else "" for m in columns]
        second.append([name, f"{scored.second(scored.floor):.1f}", *seconds])
        for method, cell in kept.items():
            if "bytes" in cell:
                costs[method].append((cell["bytes"], cell["train_seconds"], cell["steps"]))
    extra = ["best of ours", "% of full", "95 % of the difference"]
    print(table(["task", "score", "floor", *columns, *extra], rows))
    if ratios:
        print(
            f"\nBest of ours / full fine-tuning, mean over {len(ratios)} tasks: {100 * sum(ratios) / len(ratios):.1f} %"
        )
    print("\nMacro-F1 of labels, ROUGE-L of texts:\n")
    print(table(["task", "floor", *columns], second))
    middle: Callable[[Sequence[float]], float] = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    print("\nMedian over the tasks:\n")
    print(
        table(
            ["method", "bytes a task", "seconds of training", "steps"],
            [[m, *(f"{middle([cost[i] for cost in costs[m]]):,.0f}" for i in range(3))] for m in columns if m in costs],
        )
    )


if __name__ == "__main__":
    main()
