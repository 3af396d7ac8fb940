"""What every method of learning a soft prompt has in common, and what one is built from."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import InvalidRecipe
from app.text import Template
from app.train.data import Row
from app.train.initial import embedding_rms, embedding_weight, initial_prompt, keys_and_values
from app.train.recipe import Recipe

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
_PROMPT = "prompt_embeddings"  # PEFT's name of the tensor, for keys and values too
_KV = 5  # rank of keys and values
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Group:
    """Parameters that AdamW moves at the same rate: the recipe's times `scale`."""

    parameters: list[nn.Parameter]
    scale: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a method is built from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    template: Template
    rows: Sequence[Row]  # that are trained on
    tasks: Sequence[str] = ("",)  # of those rows, in the order of their numbers
    initial: Tensor | None = None  # [n, hidden], or [layers, 2, KV heads, n, head_dim]

    @property
    def device(self) -> torch.device:
        return embedding_weight(self.model).device

    @property
    def rms(self) -> float:
        """Of the base's embeddings: the unit of a learning rate."""
        return embedding_rms(self.model)

    def embeddings(self) -> Tensor:
        """To begin with -> [n, hidden] float32 on the base's device. Raises InvalidRecipe."""
        recipe = self.recipe
        if self.initial is None:
            return initial_prompt(self.model, self.tokenizer, recipe, [row.target for row in self.rows])
        if self.initial.dim() == _KV:
            raise InvalidRecipe(
                f"{recipe.method} cannot start from keys and values, only from embeddings", param="init"
            )
        self._check_initial((recipe.num_virtual_tokens, embedding_weight(self.model).shape[1]))
        return self.initial.to(self.device, torch.float32)

    def keys_and_values(self) -> Tensor:
        """To begin with: those that are given, or what the base computes for `embeddings`. Raises InvalidRecipe.

        -> [layers, 2, KV heads, n, head_dim] float32 on the base's device.
        """
        if self.initial is None or self.initial.dim() != _KV:
            return keys_and_values(self.model, self.embeddings())
        one = keys_and_values(self.model, embedding_weight(self.model)[:1])
        self._check_initial((*one.shape[:3], self.recipe.num_virtual_tokens, one.shape[4]))
        return self.initial.to(self.device, torch.float32)

    def seeded(self, make: Callable[[], M]) -> M:
        """A module with weights drawn on the CPU by the recipe's seed, so that every device begins alike."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.recipe.seed)
            module = make()
        return module.to(self.device, torch.float32)

    def dimensions(self) -> dict[str, Any]:
        """Of the base, as a PEFT configuration of an embedding method names them."""
        config = self.model.config.get_text_config()
        return {
            "task_type": "CAUSAL_LM",
            "num_transformer_submodules": 1,
            "token_dim": embedding_weight(self.model).shape[1],
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
        }

    def _check_initial(self, shape: tuple[int, ...]) -> None:
        assert self.initial is not None
        if self.initial.shape != shape:
            raise InvalidRecipe(
                f"the prompt to start from has shape {list(self.initial.shape)} but must have {list(shape)}: "
                "another number of virtual tokens, or another base",
                param="num_virtual_tokens",
            )


class Method(nn.Module, abc.ABC):
    """A trainable soft prompt. Parameters are float32 on the base's device; buffers belong to the state as well."""

    config: PeftConfig  # of the files

    @abc.abstractmethod
    def prompt(self) -> Tensor:
        """What stands before the text, differentiable in the parameters; shapes are those of app.train.forward."""

    @abc.abstractmethod
    def groups(self) -> list[Group]:
        """Every trainable parameter, in one group each."""

    def constrain(self) -> None:
        """Called after every step: project the parameters onto what the method allows."""

    def tensors(self) -> dict[str, Tensor]:
        """What the PEFT file has, by PEFT's names: float32 on the CPU, everything folded."""
        return {_PROMPT: flat(self.prompt())}

    def save(self, folder: Path, tensors: dict[str, Tensor], *, base_name: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT does. `tensors` are some of this method's."""
        self.config.base_model_name_or_path = base_name
        self.config.inference_mode = True  # the tensors are folded: PEFT builds no encoder for them
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(tensors, folder / PEFT_FILES[0], metadata={"format": "pt"})


def flat(prompt: Tensor) -> Tensor:
    """Embeddings as they are, keys and values as PEFT lays them out: [n, layers x 2 x KV heads x head_dim]."""
    if prompt.dim() == _KV:
        prompt = prompt.permute(3, 0, 1, 2, 4).flatten(1)
    return on_cpu(prompt)


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy, contiguous, float32."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
