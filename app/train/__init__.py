"""Training: JSONL rows in, a PEFT PROMPT_TUNING checkpoint out. Serving never imports this package."""

from app.train.data import Row, hold_out, read_rows
from app.train.recipe import Recipe
from app.train.report import Progress, TrainReport
from app.train.trainer import train

__all__ = ["Progress", "Recipe", "Row", "TrainReport", "hold_out", "read_rows", "train"]
