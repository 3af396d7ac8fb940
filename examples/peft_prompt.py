"""Train a soft prompt with PEFT alone, as other projects do, and save it: the folder is what softprompt serves.

    python examples/peft_prompt.py out/reviews --steps 20

`softprompt train` does the same better (docs/guides/train.md); this shows that it need not have been trained here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch
from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data" / "sentiment_mixed" / "train.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--text", default="Is the sentiment of the text negative or positive?")
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args()
    # The base model that the server runs: a folder that transformers loads.
    base = json.loads(subprocess.check_output(["softprompt", "model", "show", "--json"]))["path"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(tokenizer(options.text)["input_ids"]),
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=options.text,
        tokenizer_name_or_path=base,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    for step in range(options.steps):
        row = rows[step % len(rows)]
        prompt = tokenizer(f"{row['input']}\nSentiment:")["input_ids"]
        target = tokenizer(f" {row['target']}")["input_ids"]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])  # the loss is on the answer alone
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
