"""Methods of learning a soft prompt, one file each; all of them leave PEFT files."""

from app.train.methods.cartridge import Cartridge
from app.train.methods.cpt import CPT
from app.train.methods.method import PEFT_FILES, Group, Method, Setup
from app.train.methods.multitask import MultitaskPromptTuning
from app.train.methods.p_tuning import PTuning
from app.train.methods.prefix_tuning import PrefixTuning
from app.train.methods.prompt_tuning import PromptTuning
from app.train.recipe import MethodName

__all__ = ["PEFT_FILES", "Group", "Method", "Setup", "build"]

_CLASSES: dict[MethodName, type[Method]] = {
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "cartridge": Cartridge,
    "multitask_prompt_tuning": MultitaskPromptTuning,
    "cpt": CPT,
}


def build(setup: Setup) -> Method:
    """The method that the recipe names. Raises InvalidRecipe."""
    return _CLASSES[setup.recipe.method](setup)
