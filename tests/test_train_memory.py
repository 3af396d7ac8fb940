"""Batches too large for one forward are run in parts, to the same result; out of memory is said as what it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from app.text import Template
from app.train import Recipe, Row
from app.train.data import Example, encode
from app.train.forward import Batch, answer_nll, can_share, micro_batches
from app.train.loop import Loop
from app.train.memory import is_out_of_memory
from app.train.methods import Setup, build
from tests.tiny import MAX_MODEL_LEN, tiny_model, tiny_tokenizer

TEMPLATE = Template("{input}:")
# Answers of one word to many: a mean of the parts' means is not the mean of all.
ROWS = [Row("a " * i + "red", "pos " * (1 + 5 * (i % 3)), task="ab"[i % 2]) for i in range(9)]
METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "p_tuning": {"encoder_hidden_size": 12},
    "prefix_tuning": {},
    "cartridge": {},
    "multitask_prompt_tuning": {},
}
LIMIT = 60  # padded tokens


def loop_of(method: str, *, shared: bool) -> tuple[Loop, list[Example]]:
    model, tokenizer = tiny_model("llama").requires_grad_(False), tiny_tokenizer()
    tasks = ["a", "b"] if method == "multitask_prompt_tuning" else None
    recipe = Recipe(
        method=method, num_virtual_tokens=5, init_text="is it good", batch_size=9, max_grad_norm=1e6, **METHODS[method]
    )  # fmt: skip
    setup = Setup(model=model, tokenizer=tokenizer, recipe=recipe, template=TEMPLATE, rows=ROWS, tasks=tasks or ("",))
    return Loop(model, build(setup), recipe, shared=shared), encode(ROWS, tokenizer, TEMPLATE, MAX_MODEL_LEN, tasks)


def gradients(loop: Loop) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in loop.trained.values() if parameter.grad is not None]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_in_parts_is_the_whole_batch(method: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, examples = loop_of(method, shared=shared)
    whole = answer_nll(loop.model, loop.method.prompt(), Batch.of(examples, loop.device), shared=shared).mean()
    whole.backward()
    expected = gradients(loop)
    validation = loop._validate(examples)

    shapes: list[tuple[int, int]] = []

    def noted(*args: Any, **options: Any) -> Any:
        shapes.append(tuple(args[2].ids.shape))
        return answer_nll(*args, **options)

    monkeypatch.setattr("app.train.loop.answer_nll", noted)
    monkeypatch.setattr("app.train.loop.micro_batches", partial(micro_batches, limit=LIMIT))
    for what, value in ((loop._validate, validation), (lambda rows: loop._step(rows, 0.0, 1), whole.item())):
        shapes.clear()
        assert what(examples) == pytest.approx(value, rel=1e-6)
        assert 1 < len(shapes) < len(examples) == sum(rows for rows, _ in shapes)
        assert all(rows * (width + (2 if shared else 5)) <= LIMIT for rows, width in shapes if rows > 1)
    for found, one in zip(gradients(loop), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_fits_is_run_whole_to_the_last_bit(method: str) -> None:
    loop, examples = loop_of(method, shared=True)
    whole = answer_nll(loop.model, loop.method.prompt(), Batch.of(examples, loop.device), shared=True).mean()
    whole.backward()
    expected = gradients(loop)
    assert loop._step(examples, 0.0, 1) == whole.item()
    assert all(torch.equal(found, one) for found, one in zip(gradients(loop), expected, strict=True))


def test_parts_are_as_large_as_they_may_be() -> None:
    lengths = [3, 3, 4, 9, 30, 2, 2, 2, 2, 2, 7]
    examples = [Example(tuple(range(length)), 1) for length in lengths]
    parts = micro_batches(examples, limit=12)
    assert [[len(example.ids) for example in part] for part in parts] == [[3, 3, 4], [9], [30], [2, 2, 2, 2, 2], [7]]
    before = micro_batches(examples, before=2, limit=12)
    assert [[len(example.ids) for example in part] for part in before] == [
        [3, 3], [4], [9], [30], [2, 2, 2], [2, 2], [7],
    ]  # fmt: skip
    assert micro_batches(examples) == [examples]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (TypeError("forward() got an unexpected keyword argument"), False),
    ],
    ids=repr,
)
def test_out_of_memory_is_no_reason_to_share_nothing(
    error: Exception, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign architecture's error chooses the full forward, which would need more memory still."""
    loop, examples = loop_of("prompt_tuning", shared=True)
    assert is_out_of_memory(error) == is_one

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("app.train.forward._shared_logits", fail)
    prompt = loop.method.prompt().detach()
    if is_one:
        with pytest.raises(type(error)) as raised:
            can_share(loop.model, prompt, examples)
        assert raised.value is error
    else:
        assert not can_share(loop.model, prompt, examples)
