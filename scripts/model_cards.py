"""Write the model card, README.md, of every shipped prompt from the manifest of its newest version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {
    "soft_prompt": "**this soft prompt**",
    "constant": "always the commonest answer",
    "naive_bayes": "naive Bayes on the training rows",
    "copy": "the input, copied",
    "zero_shot": "the base model, told what to do",
    "few_shot": "the base model, told, with 8 solved rows",
}
SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": "calibration error",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "field_f1": "field F1",
    "bleu": "BLEU",
    "chrf": "chrF",
}
METHODS = {
    "prompt_tuning": "prompt tuning, {n} virtual tokens",
    "cartridge": "keys and values of {n} positions (cartridge)",
    "prefix_tuning": "keys and values of {n} positions (prefix tuning)",
}
LIMITS = {
    "address_parse": "Addresses of the United States, in one line.",
    "banking77": "A message has one intent, of a fixed set.",
    "clinc_domain": "Queries of one sentence.",
    "disfl_qa": "Questions about encyclopaedic texts, without the texts.",
    "emotion_ekman": "English comments, some of them crude.",
    "query_wellformed": "English search queries.",
    "restaurant_slots": "One turn at a time: it does not see what was said before.",
    "sentiment_mixed": "English tweets, product reviews and newspaper editorials; there is no neutral.",
}


def newest(task: Path) -> Path:
    """The folder of the version with the highest number."""
    return max((task / "versions").iterdir(), key=lambda version: int(version.name))


def rows_of(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    floors = metrics.get("floor", {})
    found = {"soft_prompt": metrics["soft_prompt"], **floors}
    return found | {name: metrics[name] for name in ("zero_shot", "few_shot") if name in metrics}


def card(task: str, version: int, manifest: dict[str, Any]) -> str:
    """The text of README.md."""
    metrics, lineage = manifest["metrics"], manifest["lineage"]
    data, recipe = lineage["data"], lineage["recipe"]
    rows = rows_of(metrics)
    columns = [name for name in SCORES if name in metrics["soft_prompt"]]
    table = [f"| | {' | '.join(SCORES[name] for name in columns)} |", f"|---{'|---:' * len(columns)}|"]
    for name, scores in rows.items():
        shown = [f"{scores[column]:.3f}" if column in scores else "" for column in columns]
        table.append(f"| {NAMES[name]} | {' | '.join(shown)} |")
    method = METHODS[recipe.get("method", "prompt_tuning")].format(n=manifest["num_virtual_tokens"])
    chosen_on = min(lineage["validation_rows"], recipe["eval_rows"])
    kind = f"one of {len(manifest['labels'])} labels" if manifest["labels"] else "text"
    route = "classify" if manifest["labels"] else "generate"
    body = json.dumps({"task": task, "input": "..."})
    return f"""# {task}

{manifest["description"]} The answer is {kind}. {LIMITS.get(task, "")}

```console
curl http://127.0.0.1:8000/v1/{route} -H 'Content-Type: application/json' -d '{body}'
```

## How good

Version {version}, on the whole test split of {metrics["rows"]} rows:

{chr(10).join(table)}

## How it was made

- Base model: {manifest["base"]["name"]}, untouched ({manifest["base"]["fingerprint"]}).
- Method: {method}; {manifest["size_bytes"]:,} bytes.
- Training: {lineage["train_rows"]:,} rows; of {lineage["steps"]} steps the one with the least loss on
  {chosen_on} validation rows is kept, {lineage["best_step"]}. The manifest has the recipe.

## Data and licences

- Rows: {data["origin"]}; {data["cite"]}; licence {data["licence"]}. None of them is in this folder.
- This soft prompt carries the licence of its data. The base model: Apache-2.0.
"""


def cards(registry: Path) -> dict[Path, str]:
    """The cards of every task of a registry folder, by their paths."""
    found = {}
    for task in sorted(path.parent for path in registry.glob("*/versions")):
        version = newest(task)
        manifest = json.loads((version / "manifest.json").read_text(encoding="utf-8"))
        found[task / "README.md"] = card(task.name, int(version.name), manifest)
    return found


if __name__ == "__main__":
    for path, text in cards(Path(__file__).resolve().parent.parent / "prompts").items():
        path.write_text(text, encoding="utf-8")
        print(path)
