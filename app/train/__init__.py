"""Training: JSONL rows in, a PEFT PROMPT_TUNING checkpoint out.

A server never imports `app.train.trainer`, and PEFT with it: its jobs run in processes of their own.
"""

from app.train.data import Row, hold_out, read_rows
from app.train.recipe import Recipe
from app.train.report import Progress, TrainReport

__all__ = ["Progress", "Recipe", "Row", "TrainReport", "hold_out", "read_rows"]
