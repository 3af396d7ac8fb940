"""Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): the KV cache of a text, trained on.

As prefix tuning, but the first tokens stay as they are: they are the sink that attention of many heads goes to, and the
paper found training unstable where they move (section 3).
"""

from __future__ import annotations

from peft import CartridgeConfig, PeftConfig
from torch import Tensor

from app.train.methods.method import Setup
from app.train.methods.prefix_tuning import PrefixTuning, kv_dimensions


class Cartridge(PrefixTuning):
    def _config(self, setup: Setup, start: Tensor) -> PeftConfig:
        return CartridgeConfig(num_frozen_tokens=self._num_frozen(setup), **kv_dimensions(setup, start))

    def _num_frozen(self, setup: Setup) -> int:
        return setup.recipe.num_frozen_tokens
