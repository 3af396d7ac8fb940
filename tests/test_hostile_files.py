"""Malformed uploads by the thousand: each is refused with a known code and a short message, or is truly valid."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import load

from app.checkpoint import MAX_MAGNITUDE, Checkpoint, Limits, read_checkpoint
from app.errors import InvalidPromptFile
from app.manifest import ManifestInput
from tests.checkpoints import BASE
from tests.long_run import SECONDS, SEED, indices, long_count, report
from tests.prompt_drafts import KV_TYPES, pack_file, pack_json, pack_values
from tests.prompt_fuzzer import KINDS, Case, case
from tests.strict_oracle import complaint

LIMITS = Limits(max_file_bytes=256 << 10)  # so that a file can be too large without costing much
CODES = {
    # the size, and the header
    *("file_too_large", "not_safetensors", "truncated_file", "trailing_bytes", "header_too_large", "invalid_header"),
    *("too_many_tensors", "unsupported_dtype", "invalid_shape", "invalid_offsets"),
    # adapter_config.json
    *("config_too_large", "invalid_config", "unsupported_peft_type", "unsupported_task_type", "unsupported_submodules"),
    *("too_many_virtual_tokens", "layer_count_mismatch", "kv_heads_mismatch", "head_dim_mismatch"),
    # one against the other, and the values
    *("missing_tensor", "unexpected_tensor", "tensor_shape_mismatch", "hidden_size_mismatch"),
    *("num_virtual_tokens_mismatch", "task_id_out_of_range", "non_finite", "magnitude_too_large"),
}
# The one outcome of files that were spoilt in one way only; None is accepted.
ALWAYS: dict[str, set[str | None]] = {
    "": {None},
    "shape and size": {"truncated_file", "invalid_offsets"},
    "offsets": {"invalid_offsets"},
    "hole": {"invalid_offsets", "trailing_bytes"},
    "many tensors": {"too_many_tensors", "unexpected_tensor", "header_too_large"},
    "entry keys": {"invalid_header"},
    "entry kind": {"invalid_header"},
    "metadata": {None, "invalid_header", "header_too_large"},
    "data": {"truncated_file", "trailing_bytes"},
    "value": {None, "non_finite", "magnitude_too_large"},
    "config dangerous": {None},
    "config task type": {None, "unsupported_task_type"},
    "task id": {None, "task_id_out_of_range"},
    "header text: cut": {"invalid_header"},
    "header text: duplicate": {"invalid_header"},
    "header text: deep": {"invalid_header", "header_too_large"},
    "header text: same": {None},
    "config text: cut": {"invalid_config"},
    "config text: duplicate": {"invalid_config"},
    "config text: same": {None},
    "truncate": {"truncated_file"},
    "tail": {"trailing_bytes"},
    "foreign": {"not_safetensors", "header_too_large", "invalid_header", "truncated_file"},
    "foreign header": {"invalid_header", "not_safetensors"},
    "large": {"file_too_large", "trailing_bytes"},
}


def outcome(given: Case) -> tuple[str | None, float]:
    """The code of a refusal, None if the files were accepted; and the seconds. Any other exception escapes."""
    began = time.perf_counter()
    try:
        found = read_checkpoint(given.config, given.tensors, given.manifest, BASE, limits=LIMITS)
    except InvalidPromptFile as error:
        seconds = time.perf_counter() - began
        check_refusal(error, given)
        return error.code, seconds
    seconds = time.perf_counter() - began
    check_accepted(found, given)
    return None, seconds


def check_refusal(error: InvalidPromptFile, given: Case) -> None:
    message = error.message
    assert error.code in CODES and error.status == 422, (error.code, message)
    assert error.param == ("manifest" if error.code == "task_id_out_of_range" else error.param)
    assert error.param in ("adapter_model", "adapter_config", "manifest")
    assert message.isascii() and message.isprintable() and len(message) < 320, message
    assert not any(word in message for word in ("Traceback", 'File "', "site-packages", ".py", " at 0x")), message
    check_echo(message, given)


def check_echo(message: str, given: Case) -> None:
    """Nothing of the files stands in the message at a length above 60."""
    # Any such run covers one of these pieces, which are few.
    pieces = [message[start : start + 41].encode() for start in range(0, len(message) - 40, 20)]
    if any(piece in given.config or piece in given.tensors for piece in pieces):
        for start in range(len(message) - 60):
            piece = message[start : start + 61].encode()
            assert piece not in given.config and piece not in given.tensors, message


def check_accepted(found: Checkpoint, given: Case) -> None:
    """The library reads the same numbers, the prompt is made of them, and the JSON is strict."""
    header = given.tensors[8 : 8 + int.from_bytes(given.tensors[:8], "little")]
    assert complaint(given.config) is None and complaint(header) is None, (complaint(given.config), complaint(header))
    assert header.startswith(b"{") and header.rstrip(b" ").endswith(b"}")
    stored = {name: tensor.float().numpy() for name, tensor in load(given.tensors).items()}
    for name, values in raw_values(given.tensors).items():
        np.testing.assert_array_equal(values, stored[name])
    with np.errstate(under="ignore"):
        expected = soft_prompt(found.peft_type, stored, given.manifest.task_id)
    prompt = found.prompt.tensor.numpy()
    assert prompt.dtype == np.float32 and prompt.shape == expected.shape
    assert np.isfinite(prompt).all() and np.abs(prompt).max() <= MAX_MAGNITUDE
    if found.peft_type == "MULTITASK_PROMPT_TUNING":  # sums in another order
        np.testing.assert_allclose(prompt, expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(prompt, expected)
    assert found.prompt.num_virtual_tokens == json.loads(given.config)["num_virtual_tokens"]
    assert all(len(warning) < 1_000 and warning.isascii() for warning in found.warnings)


def soft_prompt(peft_type: str, stored: dict[str, Any], task_id: int) -> Any:
    """What the files mean, by numpy."""
    shared = stored["prompt_embeddings"]
    if peft_type in KV_TYPES:
        split = shared.reshape(len(shared), BASE.num_layers, 2, BASE.num_kv_heads, BASE.head_dim)
        return split.transpose(1, 2, 3, 0, 4)
    if peft_type == "MULTITASK_PROMPT_TUNING":
        (tasks, n, rank), rows = stored["prefix_task_cols"].shape, stored["prefix_task_rows"].shape
        assert (n, rows) == (len(shared), (tasks, rank, shared.shape[1]))
        return shared * (stored["prefix_task_cols"][task_id] @ stored["prefix_task_rows"][task_id])
    return shared


def raw_values(file: bytes) -> dict[str, Any]:
    """The numbers as float32, read without the library."""
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        part = data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(part, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype("<f4")
        found[name] = values.reshape(entry["shape"])
    return found


def run(seed: int, count: int, limit: float = float("inf")) -> tuple[Counter[str | None], list[float]]:
    """Every outcome, and the seconds of each refusal."""
    outcomes: Counter[str | None] = Counter()
    seconds = []
    for index in indices(count, limit):
        given = case(seed, index)
        try:
            code, took = outcome(given)
            allowed = ALWAYS.get("".join(given.kinds)) if len(given.kinds) < 2 else None
            assert allowed is None or code in allowed, code
        except Exception as error:
            raise AssertionError(f"case({seed}, {index}), {given.kinds}: {error!r}"[:2_000]) from error
        outcomes[code] += 1
        if code is not None:
            seconds.append(took)
    return outcomes, seconds


def check_run(outcomes: Counter[str | None], seconds: list[float]) -> None:
    assert outcomes.keys() == CODES | {None}, "every code is reached"
    assert outcomes[None] > 0.05 * outcomes.total(), "enough are valid for it to mean something"
    seconds.sort()
    p99 = seconds[len(seconds) * 99 // 100]
    assert p99 < 0.05, f"{p99:.3f} s"


def test_malformed_files() -> None:
    before = psutil.Process().memory_info().rss
    check_run(*run(SEED + 1, 4_000))  # 2,300 of which reach every code
    assert psutil.Process().memory_info().rss - before < 100 << 20


@pytest.mark.long
@pytest.mark.timeout(0)
def test_a_million_malformed_files(capsys: pytest.CaptureFixture[str]) -> None:
    process = psutil.Process()
    run(SEED, 2_000)
    before = process.memory_info().rss
    outcomes, seconds = run(SEED, long_count(1_000_000), SECONDS)
    check_run(outcomes, seconds)
    grown = process.memory_info().rss - before
    with capsys.disabled():
        p99, worst = seconds[len(seconds) * 99 // 100], seconds[-1]
        figures = f"seed {SEED}, {outcomes.total()} files, refusals p99 {p99 * 1e3:.2f} ms, worst {worst * 1e3:.0f} ms"
        report(f"{figures}, RSS +{grown >> 20} MiB\n{outcomes.most_common()}")
    assert grown < 200 << 20


def test_cases_are_the_same_for_the_same_seed() -> None:
    forward = [case(SEED, index) for index in range(1_000)]
    assert [case(SEED, index) for index in reversed(range(1_000))] == forward[::-1], "none depends on the others"
    assert case(1, 5) != case(2, 5)
    assert {kind for index in range(len(KINDS) * 4) for kind in case(SEED, index).kinds} == set(KINDS)


CONFIG = pack_json({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4})
ENTRY = {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}
VALID = pack_file(pack_json({"prompt_embeddings": ENTRY}), pack_values("F32", [0.5] * 32))


def refuse(tensors: bytes, config: bytes = CONFIG, limits: Limits = LIMITS) -> str:
    code = None
    with pytest.raises(InvalidPromptFile):
        try:
            read_checkpoint(config, tensors, ManifestInput(), BASE, limits=limits)
        except InvalidPromptFile as error:
            code = error.code
            check_refusal(error, Case((), config, tensors, ManifestInput()))
            raise
    assert code is not None
    return code


def test_every_length_and_every_flipped_bit_of_a_header() -> None:
    for size in range(len(VALID)):
        assert refuse(VALID[:size]) == "truncated_file"
    header_end = len(VALID) - 128
    for place in range(header_end):
        for bit in range(8):
            spoilt = bytearray(VALID)
            spoilt[place] ^= 1 << bit
            outcome(Case((), CONFIG, bytes(spoilt), ManifestInput()))


def declared() -> Iterator[tuple[bytes, bytes]]:
    """Small files that speak of large things."""
    for power in range(17, 64):
        yield (1 << power).to_bytes(8, "little") + VALID[8:], CONFIG
        shape = [1 << (power - 3), 8]
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 << power]}
        config = pack_json({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": shape[0]})
        yield pack_file(pack_json({"prompt_embeddings": entry}), bytes(128)), config
        yield pack_file(pack_json({"prompt_embeddings": {**ENTRY, "shape": shape}}), bytes(128)), config
        yield VALID, config
    yield pack_file(b'{"a":' + b"[" * 60_000, b""), CONFIG
    yield pack_file(b'{"a":1' + b"0" * 60_000 + b"}", b""), CONFIG


def test_nothing_is_allocated_by_a_declared_size() -> None:
    process = psutil.Process()
    tracemalloc.start()
    try:
        for tensors, config in declared():
            refuse(tensors, config)
            tracemalloc.reset_peak()
            before, resident = tracemalloc.get_traced_memory()[0], process.memory_info().rss
            refuse(tensors, config)
            assert tracemalloc.get_traced_memory()[1] - before < 20 * len(tensors) + 200_000
            assert process.memory_info().rss - resident < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_huge_configuration_costs_nothing() -> None:
    config = CONFIG[:-1] + b',"x":"' + b"x" * (50 << 20) + b'"}'
    began = time.perf_counter()
    with pytest.raises(InvalidPromptFile) as caught:
        read_checkpoint(config, VALID, ManifestInput(), BASE)
    assert caught.value.code == "config_too_large" and time.perf_counter() - began < 0.05


@pytest.mark.parametrize("value", [1e6, -1e6])
def test_the_largest_magnitude(value: float) -> None:
    def tensors(largest: float) -> bytes:
        return VALID[:-4] + struct.pack("<f", largest)

    found = read_checkpoint(CONFIG, tensors(value), ManifestInput(), BASE)
    assert "float16" in found.warnings[0]
    assert refuse(tensors(float(np.nextafter(np.float32(value), np.float32(value * 2))))) == "magnitude_too_large"
    assert refuse(tensors(value * 1e32)) == "magnitude_too_large"


def test_nothing_is_written_or_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither archives nor the paths and addresses in a configuration are followed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("a socket was made"))
    for index in range(500):
        outcome(case(SEED + 2, index))
    assert not list(tmp_path.iterdir())
