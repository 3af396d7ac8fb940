"""Every row of a mixed batch equals PEFT's model with that adapter alone, whatever runs the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from app.soft_prompt import SoftPrompt
from tests.core_harness import Harness
from tests.peft_oracle import (
    PEFT_TYPES,
    oracle_generate,
    oracle_logits,
    read_folder,
    save_adapter,
    task_id,
)
from tests.tiny import ARCHITECTURES, FAMILY, VOCAB_SIZE, tiny_info, tiny_model

NEW_TOKENS = 6
PLACES = [(architecture, "transformers") for architecture in ARCHITECTURES]
PLACES += [(architecture, backend) for architecture in FAMILY for backend in ("fused", "native")]


class Adapters:
    """Of one type for one model, with PEFT's answers: each is computed once, whatever is held to it."""

    def __init__(self, architecture: str, peft_type: str, folder: Path) -> None:
        self._model, self._peft_type = tiny_model(architecture), peft_type
        self.folders = {
            number: save_adapter(self._model, folder / str(number), peft_type, length, seed=number)
            for number, length in enumerate((1, 7, 20, 100))
        }
        self.logits = cache(self._logits)

    def _logits(self, number: int | None, token_ids: tuple[int, ...]) -> torch.Tensor:
        folder = None if number is None else self.folders[number]
        return oracle_logits(self._model, folder, list(token_ids), task_id(self._peft_type, number or 0))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Adapters]:
    return cache(lambda architecture, kind: Adapters(architecture, kind, tmp_path_factory.mktemp("adapters")))


# What runs the model is given rows, or keys and values, and not the type that they are of.
ROWS_AND_KV = ("PROMPT_TUNING", "PREFIX_TUNING")
MIXES = [
    pytest.param(
        *(architecture, backend, kind),
        marks=[] if backend == "transformers" or kind in ROWS_AND_KV else [pytest.mark.long],
    )
    for kind in PEFT_TYPES
    for architecture, backend in PLACES
]


@pytest.mark.parametrize(("architecture", "backend", "peft_type"), MIXES)
def test_mixed_batch_equals_peft_alone(
    architecture: str,
    backend: str,
    peft_type: str,
    adapters: Callable[[str, str], Adapters],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(architecture)
    info = tiny_info(model)
    rng = random.Random(f"{architecture} {peft_type}")
    harness = Harness(model, info, monkeypatch, max_num_batched_tokens=48, backend=backend)
    oracle = adapters(architecture, peft_type)
    prompts = {
        number: read_folder(folder, info, task_id(peft_type, number)).prompt
        for number, folder in oracle.folders.items()
    }
    assert [prompt.num_virtual_tokens for prompt in prompts.values()] == [1, 7, 20, 100]
    rows: list[tuple[int | None, list[int]]] = []
    for chosen in (0, 1, None, 0, 2, 3, None, 1, 3, 2, 0):
        rows.append((chosen, [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]))
    rows.append((3, [5]))  # the shortest text, and the longest
    rows.append((1, [rng.randrange(VOCAB_SIZE) for _ in range(60)]))
    for chosen, token_ids in rows:
        harness.add(None if chosen is None else prompts[chosen], token_ids, max_tokens=NEW_TOKENS)
    harness.run()
    for name, (chosen, token_ids) in enumerate(rows):
        harness.assert_equals(name, token_ids, oracle.logits(chosen, (*token_ids, *harness.ids(name))))
    harness.assert_clean()


def test_all_types_share_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    info = tiny_info(model)
    harness = Harness(model, info, monkeypatch)
    rows: list[tuple[str | None, Path | None, list[int]]] = [(None, None, [4, 2])]
    for number, peft_type in enumerate(PEFT_TYPES):
        folder = save_adapter(model, tmp_path / peft_type, peft_type, 3 + 5 * number, seed=number)
        rows.append((peft_type, folder, [number + 1] * (3 * number + 1)))
    for peft_type, folder, token_ids in rows:
        prompt = read_folder(folder, info, task_id(peft_type or "", 1)).prompt if folder else None
        harness.add(prompt, token_ids, max_tokens=NEW_TOKENS)
    harness.run()
    for name, (peft_type, folder, token_ids) in enumerate(rows):
        expected = oracle_logits(model, folder, token_ids + harness.ids(name), task_id(peft_type or "", 1))
        harness.assert_equals(name, token_ids, expected)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # PEFT, right at batch 1
@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_greedy_tokens_equal_peft_generate(peft_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    info = tiny_info(model)
    harness = Harness(model, info, monkeypatch)
    folder = save_adapter(model, tmp_path, peft_type, 20, seed=5)
    prompt = read_folder(folder, info, task_id(peft_type, 1)).prompt
    texts = [[3, 1, 4, 1, 5], [9, 2, 6], [5]]
    for token_ids in texts:
        harness.add(prompt, token_ids, max_tokens=20)
        harness.add(None, token_ids, max_tokens=20)
    harness.run()
    for row, token_ids in enumerate(texts):
        assert harness.ids(2 * row) == oracle_generate(model, folder, token_ids, 20, task_id(peft_type, 1))
        assert harness.ids(2 * row) != harness.ids(2 * row + 1), "the prompt has no effect"


@pytest.mark.parametrize(("architecture", "backend"), PLACES)
def test_embedding_rows_of_real_tokens_equal_the_tokens_as_text(
    architecture: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    harness = Harness(model, tiny_info(model), monkeypatch, max_num_batched_tokens=40, backend=backend)
    rng = random.Random(architecture)
    embeddings = model.get_input_embeddings().weight.detach()
    scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)  # Gemma 3 scales inside the layer
    pairs = []
    for length in (1, 7, 16, 20, 33, 100):
        virtual = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        prompt = SoftPrompt("embedding", embeddings[virtual] * scale, digest=f"sha256:{length}")
        text = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
        pairs.append((harness.add(prompt, text, max_tokens=10), harness.add(None, virtual + text, max_tokens=10)))
    harness.run()
    for number in range(len(pairs)):
        soft, plain = 2 * number, 2 * number + 1
        assert harness.ids(soft) == harness.ids(plain)
        for ours, theirs in zip(harness.logits[soft], harness.logits[plain], strict=True):
            assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("architecture", "backend"), PLACES)
def test_scores_equal_the_plain_forward(
    architecture: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    info = tiny_info(model)
    harness = Harness(model, info, monkeypatch, max_num_batched_tokens=32, backend=backend)
    folder = save_adapter(model, tmp_path, "PROMPT_TUNING", 7, seed=1)
    prompt = read_folder(folder, info).prompt
    rng = random.Random(0)
    requests = []
    for chosen in (prompt, None, prompt):
        context = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
        continuations = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 3, 1, 5, 20, 2)]
        requests.append((chosen, context, continuations, harness.score(chosen, context, continuations)))
    harness.add(prompt, [1, 2, 3])
    harness.run()
    for chosen, context, continuations, results in requests:
        (logprobs,) = results
        for continuation, found in zip(continuations, logprobs, strict=True):
            logits = oracle_logits(model, folder if chosen else None, context + continuation)
            expected = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
            expected = expected.gather(-1, torch.tensor(continuation)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)
    harness.assert_clean()
