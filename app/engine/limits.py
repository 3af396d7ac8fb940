"""What a request may ask for: checked in the caller's thread, before anything is queued."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from app.engine.block_manager import BlockManager
from app.errors import ContextLengthExceeded, InvalidRequest
from app.soft_prompt import BaseInfo, SoftPrompt


class Limits:
    """Those of the model and of the KV cache."""

    def __init__(self, info: BaseInfo, blocks: BlockManager) -> None:
        """Of `blocks` only the sizes matter, which never change."""
        self._info = info
        self._blocks = blocks

    @property
    def max_model_len(self) -> int:
        """What fits both, whatever the soft prompt: a copied block is set aside."""
        return min(self._info.max_model_len, (self._blocks.num_usable_blocks - 1) * self._blocks.block_size)

    def check(self, prompt: SoftPrompt | None, token_ids: Sequence[int], max_tokens: int) -> None:
        """Raises InvalidRequest, ContextLengthExceeded."""
        if not token_ids:
            raise InvalidRequest("the input has no tokens", param="input")
        self.check_ids(token_ids)
        virtual = prompt.num_virtual_tokens if prompt else 0
        total = virtual + len(token_ids) + max_tokens
        if total > self._info.max_model_len or not self._blocks.fits_alone(virtual, total):
            # A partial last block of the soft prompt is copied.
            size = self._blocks.block_size
            room = (self._blocks.num_usable_blocks - bool(virtual % size)) * size
            limit, owner = min((self._info.max_model_len, "the model"), (room, "the KV cache"))
            raise ContextLengthExceeded(
                f"{virtual} virtual tokens + {len(token_ids)} text tokens + up to {max_tokens} new ones make {total}; "
                f"the limit is {limit}, set by {owner}",
                param="input",
            )

    def check_ids(self, token_ids: Iterable[int], param: str = "input") -> None:
        """Raises InvalidRequest for an id that is not in the vocabulary."""
        bad = next((i for i in token_ids if not 0 <= i < self._info.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is not in the vocabulary of {self._info.vocab_size}", param=param)
