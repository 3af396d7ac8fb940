"""Triton without a GPU: kernels by its interpreter, which computes them with numpy, or compiled but not run."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from app.engine import triton_attention

KERNELS = "app.engine.triton_kernels"


def import_kernels(monkeypatch: pytest.MonkeyPatch, *, interpreted: bool) -> Any:
    """app.engine.triton_kernels, for `TritonAttention` as well, which then takes any device. Needs Triton.

    Whether a kernel is interpreted is settled when it is defined, also for those that Triton itself brings: so all of
    it is imported anew.
    """
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if "._C" not in name:  # not Python, and the same either way
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, KERNELS, None)  # so that what was there comes back
    del sys.modules[KERNELS]
    kernels = importlib.import_module(KERNELS)
    monkeypatch.setattr(triton_attention, "require_card", lambda *_: None)
    if interpreted:
        mend_scalars(monkeypatch)
    return kernels


def mend_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's scalars are arrays of one number, which numpy from 2.4 on does not take for a number."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
