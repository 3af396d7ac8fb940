"""Our own kernels equal the reference, whatever is mixed: by Triton's interpreter, for nothing here has a GPU.

Triton is no requirement, for development either: it is large, and on GPUs it comes with torch. Without it only the
division of the work is tested. To have all: `pip install --target DIR --no-deps triton==3.6.0` and PYTHONPATH=DIR.
The interpreter does not know bfloat16; that it compiles is all that is known of it here, and `make gpu-check` is for
the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.engine import triton_attention
from app.engine.attention_check import Faulty, Unavailable, check_attention
from app.engine.attention_kernels import choose_attention
from app.engine.paged_attention import Geometry, PagedBatch, paged_batch
from app.engine.triton_attention import LEAST_PART, TritonAttention, tilings
from tests.attention_emulation import attend, pages
from tests.test_fused_decoder import Row, family_model, make, run_schedule
from tests.triton_interpreter import import_kernels

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: make test-triton"
)


def by_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.usefixtures("interpreted"),
        pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of what is infinite or not a number
        needs_triton,
    ):
        test = mark(test)
    return test


CPU = torch.device("cpu")
PLAIN = Geometry(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    max_blocks=40,
    scale=0.125,
    windows=(0,),
    dtype=torch.float32,
    device=CPU,
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_kernels(monkeypatch, interpreted=True)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device so large that even short rows are cut."""
    monkeypatch.setattr(triton_attention, "_processors", lambda _: 8)
    monkeypatch.setattr(triton_attention, "LEAST_PART", 10)


class Rows:
    """Rows at scattered blocks of a pool that is not a number anywhere else."""

    def __init__(self, geometry: Geometry, query_lens: Sequence[int], key_lens: Sequence[int], seed: int = 0) -> None:
        self.geometry = g = geometry
        self.query_lens, self.key_lens = list(query_lens), list(key_lens)
        self._generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // g.block_size) for length in key_lens]
        blocks = random.Random(seed).sample(range(1, 1 + sum(counts)), sum(counts))
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        shape = (2, 1 + sum(counts), g.block_size, g.num_kv_heads, g.head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=g.dtype)
        for table, length in zip(self.tables, key_lens, strict=True):
            for i, block in enumerate(table):
                filled = min(g.block_size, length - i * g.block_size)
                self.pool[:, block, :filled] = self.random(2, filled, g.num_kv_heads, g.head_dim)
        # As the decoder makes it: queries stand beside keys and values.
        self.q = self.random(sum(query_lens), g.num_heads + 2 * g.num_kv_heads, g.head_dim)[:, : g.num_heads]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.geometry.dtype)

    def batch(self, *, static: bool = False) -> PagedBatch:
        return paged_batch(self.query_lens, self.key_lens, self.tables, CPU, static=static)

    def expected(self, window: int) -> list[torch.Tensor]:
        """By row."""
        return [
            attend(
                q.float(),
                pages(self.pool[0], torch.tensor(table), length).float(),
                pages(self.pool[1], torch.tensor(table), length).float(),
                self.geometry.scale,
                left=window - 1 if window else -1,
                right=0,
            )
            for q, table, length in zip(self.q.split(self.query_lens), self.tables, self.key_lens, strict=True)
        ]

    def compare(self, attention: TritonAttention, *, static: bool = False, broken: int | None = None) -> None:
        """With the expected; a broken row must be not a number, all of it."""
        batch = self.batch(static=static)
        attention.plan(batch)
        for window in self.geometry.windows:
            found = attention(self.q, self.pool[0], self.pool[1], batch, window)
            assert found.dtype == self.geometry.dtype and found.shape == self.q.shape and found.is_contiguous()
            for row, (ours, right) in enumerate(zip(found.split(self.query_lens), self.expected(window), strict=True)):
                if row == broken:
                    assert ours.isnan().all()
                else:
                    limit = 1e-5 if self.geometry.dtype is torch.float32 else 3e-3
                    assert (ours.float() - right).abs().max() < limit, (row, window)


# -- against plain attention -------------------------------------------------------------------------------------------


@by_interpreter
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "window", "dtype"),
    [
        (2, 2, 64, 16, 0, torch.float32),
        (3, 1, 80, 16, 5, torch.float32),
        (8, 2, 128, 16, 24, torch.float16),
        (8, 1, 64, 16, 0, torch.float16),
        (6, 2, 16, 16, 16, torch.float32),
        (4, 2, 256, 16, 0, torch.float16),
        (4, 4, 48, 256, 17, torch.float32),
        (40, 1, 16, 24, 0, torch.float32),
    ],
)
def test_any_mix(heads: int, kv_heads: int, head_dim: int, block_size: int, window: int, dtype: torch.dtype) -> None:
    geometry = replace(
        PLAIN,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        scale=head_dim**-0.5,
        windows=(0, window) if window else (0,),
        dtype=dtype,
    )
    attention = TritonAttention(geometry)
    Rows(geometry, (1, 7, 40, 1, 2, 33), (1, 16, 40, 81, 17, 70)).compare(attention)
    single = Rows(geometry, [1] * 6, (15, 16, 17, 1, 64, 65))
    single.compare(attention)
    single.compare(attention, static=True)


@by_interpreter
@pytest.mark.parametrize(
    ("window", "dtype"), [(0, torch.float32), (30, torch.float32), (100, torch.float16), (0, torch.float16)]
)
@pytest.mark.usefixtures("many_parts")
def test_keys_cut_into_parts(dtype: torch.dtype, window: int) -> None:
    geometry = replace(PLAIN, num_heads=2, num_kv_heads=1, head_dim=32, windows=(window,), dtype=dtype)
    attention = TritonAttention(geometry)
    for query_lens, key_lens in (
        ([1], [640]),
        ([1, 1, 1], [1, 400, 33]),
        ([1, 5, 30], [140, 330, 30]),
        ([70], [200]),
    ):
        rows = Rows(geometry, query_lens, key_lens)
        rows.compare(attention)
        assert attention._plan is not None and attention._plan.merges
        if max(query_lens) == 1:
            rows.compare(attention, static=True)


@by_interpreter
def test_more_parts_than_are_merged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_processors", lambda _: 20)
    monkeypatch.setattr(triton_attention, "LEAST_PART", 32)
    geometry = replace(PLAIN, num_heads=2, num_kv_heads=1, head_dim=16, max_blocks=80)
    attention = TritonAttention(geometry)
    rows = Rows(geometry, [1, 1], [1280, 3])
    rows.pool[0] *= 4  # so that the largest scores differ
    rows.compare(attention)
    assert attention._plan is not None and attention._plan.items == 40


@by_interpreter
def test_a_part_in_which_a_query_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tile's queries the last has a window that begins where that of the first ends."""
    monkeypatch.setattr(triton_attention, "_processors", lambda _: 16)
    monkeypatch.setattr(triton_attention, "LEAST_PART", 1)
    geometry = replace(PLAIN, num_heads=1, num_kv_heads=1, head_dim=16, windows=(3,))
    attention = TritonAttention(geometry)
    Rows(geometry, [32], [300]).compare(attention)
    assert attention._plan is not None and attention._plan.items > 10


@by_interpreter
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("many_parts")
def test_not_a_number_stays_in_its_row(where: str, static: bool) -> None:
    attention = TritonAttention(PLAIN)
    rows = Rows(PLAIN, [1, 1, 1] if static else [1, 3, 1], [200, 130, 90])
    if where == "query":
        rows.q[rows.query_lens[0] : -1] = torch.nan
    else:
        rows.pool[0 if where == "key" else 1, rows.tables[1][0]] = torch.nan
    rows.compare(attention, static=static, broken=1)


@by_interpreter
def test_infinity_behind_the_end() -> None:
    rows = Rows(PLAIN, [1, 9], [17, 9])
    rows.pool.nan_to_num_(nan=torch.inf)
    rows.compare(TritonAttention(PLAIN))


@by_interpreter
def test_it_passes_the_check_at_start() -> None:
    geometry = replace(PLAIN, windows=(0, 24), head_dim=16)
    check_attention(TritonAttention(geometry), geometry)


@by_interpreter
def test_a_model_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model("qwen3")
    monkeypatch.setattr("app.engine.decoder.choose_attention", lambda _, geometry: (TritonAttention(geometry), []))
    made = make(model, monkeypatch, backend="triton", graphs=True, num_blocks=12)
    assert "attention triton, CUDA graphs on" in made.forward.describe
    lengths = [(1, 0), (6, 20), (33, 0)]
    rows = [Row(model, made, length, seed, virtual=virtual) for seed, (length, virtual) in enumerate(lengths)]
    run_schedule(made.forward, rows, seed=3)
    assert made.graphs.replays > 3


@by_interpreter
@pytest.mark.parametrize("fault", ["another's keys", "part left out"])
def test_one_that_is_wrong_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = replace(PLAIN, head_dim=16, max_blocks=90)
    if fault == "part left out":
        divide = TritonAttention._divide

        def wrong(self: TritonAttention, tiles: Any) -> Any:
            items, merges = divide(self, tiles)
            return items, [(row, first, parts - 1, slot) for row, first, parts, slot in merges]

        monkeypatch.setattr(TritonAttention, "_divide", wrong)
        monkeypatch.setattr(triton_attention, "_processors", lambda _: 60)
    else:
        call = TritonAttention.__call__
        monkeypatch.setattr(
            TritonAttention, "__call__", lambda self, q, k, v, *rest: call(self, q, k.flip(2).contiguous(), v, *rest)
        )
    with pytest.raises(Faulty, match="triton attention: differs"):
        choose_attention("triton", geometry)


# -- compiled ----------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_a_gpu(dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H100, with what the card has: 99 KiB of shared memory a program is what any card from 8.0 on has."""
    kernels = import_kernels(monkeypatch, interpreted=False)
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    triton, source = importlib.import_module("triton"), importlib.import_module("triton.compiler").ASTSource
    dim_pad = 1 << (head_dim - 1).bit_length()
    ints, numbers = {"table_stride", "q_stride", "offset"}, {"partial", "logs"}
    common = {"KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": 4, "DIM": head_dim, "DIM_PAD": dim_pad}
    for tiling in tilings(torch.bfloat16 if dtype == "bf16" else torch.float32, dim_pad, 4):
        loop = {"PAGE": 16, "WINDOW": 24, "LINES": tiling.lines, "KEYS": tiling.keys, "PRECISION": "tf32x3"}
        last = {"LINES": tiling.lines, "USED": 4, "PARTS": 16}
        for kernel, constants in ((kernels.attend, common | loop), (kernels.merge, common | last)):
            types = {}
            for name in kernel.arg_names:
                if name in constants:
                    types[name] = "constexpr"
                elif name in ints:
                    types[name] = "i32"
                elif name == "scale":
                    types[name] = "fp32"
                elif name in numbers:
                    types[name] = "*fp32"
                else:
                    types[name] = f"*{dtype}" if name in ("q", "k", "v", "out") else "*i32"
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n][0] == "*"}
            built = triton.compile(
                source(kernel, types, {(kernel.arg_names.index(n),): value for n, value in constants.items()}, aligned),
                target=target,
                options={"num_warps": tiling.warps, "num_stages": tiling.stages},
            )
            assert built.metadata.shared <= 99 << 10


# -- the division of the work ------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but plans: no Triton."""
    monkeypatch.setattr(triton_attention, "_load_kernels", lambda _: SimpleNamespace())
    monkeypatch.setattr(triton_attention, "_processors", lambda _: 132)


def work_of(attention: TritonAttention) -> tuple[list[list[int]], list[list[int]]]:
    plan = attention._plan
    assert plan is not None
    items, merges = plan.work[: 5 * plan.items].view(-1, 5), plan.work[5 * plan.items :].view(-1, 4)
    assert len(merges) == plan.merges
    return items.tolist(), merges.tolist()


def batch_of(query_lens: Sequence[int], key_lens: Sequence[int], *, static: bool = False) -> PagedBatch:
    return paged_batch(query_lens, key_lens, [[0]] * len(key_lens), CPU, static=static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.usefixtures("planned")
def test_the_work_is_complete_and_fits(kv_heads: int, static: bool) -> None:
    geometry = replace(PLAIN, num_heads=8, num_kv_heads=kv_heads, max_blocks=8192)
    attention = TritonAttention(geometry)
    spare = 2 * 132 // kv_heads - 1
    slots = len(attention._logs) // kv_heads // attention._ragged.lines
    choose = random.Random(kv_heads)
    for _ in range(200):
        rows = choose.choice((1, 2, 5, 40))
        key_lens = [int(2 ** choose.uniform(0, 17)) for _ in range(rows)]
        query_lens = [1 if static or choose.random() < 0.7 else choose.randint(1, min(n, 300)) for n in key_lens]
        attention.plan(batch_of(query_lens, key_lens, static=static))
        items, merges = work_of(attention)
        per_tile = 1 if max(query_lens) == 1 else attention._ragged.lines // (8 // kv_heads)
        tiles = {(row, first) for row, count in enumerate(query_lens) for first in range(0, count, per_tile)}
        if static:
            assert len(items) == rows + spare and len(merges) == spare
        items, merges = ([each for each in work if each[0] >= 0] for work in (items, merges))
        assert {(row, first) for row, first, *_ in items} == tiles and len(items) <= len(tiles) + spare
        used: list[int] = []
        for row, first in tiles:
            own = [item for item in items if item[:2] == [row, first]]
            parts = own[0][3]
            assert [item[2] for item in own] == list(range(parts)) and all(item[3] == parts for item in own)
            assert parts == 1 or key_lens[row] >= parts * LEAST_PART
            wanted = [[row, first, parts, own[0][4]]] if parts > 1 else []
            assert [each for each in merges if each[:2] == [row, first]] == wanted
            if parts > 1:
                used += [item[4] for item in own]
        assert len(set(used)) == len(used) and all(0 <= slot < slots for slot in used)


@pytest.mark.usefixtures("planned")
def test_who_gets_more_programs() -> None:
    attention = TritonAttention(replace(PLAIN, num_heads=32, num_kv_heads=8, max_blocks=8192))

    def parts(*key_lens: int) -> list[int]:
        attention.plan(batch_of([1] * len(key_lens), key_lens))
        return [sum(item[0] == row for item in work_of(attention)[0]) for row in range(len(key_lens))]

    assert parts(100_000) == [33]  # with 8 key heads two on each of 132 processors
    assert parts(511) == [1] and parts(512) == [2]  # a part has work to do
    assert parts(100_000, 100, 100) == [32, 1, 1]
    assert parts(*[2000] * 64) == [1] * 64  # enough rows
    assert parts(*[200] * 255, 100_000)[-1] > 20  # none waits for one long row


@pytest.mark.usefixtures("planned")
def test_a_window_bounds_what_there_is_to_divide() -> None:
    for windows, most in (((4096, 0), 33), ((1024, 300), 4)):
        attention = TritonAttention(replace(PLAIN, num_heads=32, num_kv_heads=8, max_blocks=8192, windows=windows))
        attention.plan(batch_of([1], [100_000]))
        assert len(work_of(attention)[0]) == most


@pytest.mark.usefixtures("planned")
def test_graphs_of_models_with_short_rows_have_no_merges() -> None:
    attention = TritonAttention(replace(PLAIN, max_blocks=31))
    attention.plan(batch_of([1, 1], [496, 3], static=True))
    items, merges = work_of(attention)
    assert len(items) == 2 and not merges


@pytest.mark.usefixtures("planned")
def test_a_graph_finds_its_work_where_it_was() -> None:
    """Replays read the memory of the capture; what an earlier step left there is gone."""
    attention = TritonAttention(replace(PLAIN, max_blocks=8192))
    places: dict[int, int] = {}
    for key_lens in ([5000, 9000], [3, 4], [100_000], [7, 1000], [9]):
        attention.plan(batch_of([1] * len(key_lens), key_lens, static=True))
        assert attention._plan is not None
        place = attention._plan.work.data_ptr()
        assert places.setdefault(len(key_lens), place) == place
        items, merges = work_of(attention)
        if max(key_lens) < 512:
            assert all(item[0] == -1 for item in items[len(key_lens) :]) and all(each[0] == -1 for each in merges)
    assert len(set(places.values())) == 2


def test_no_axis_of_a_launch_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 2**31 - 1 programs along the first and 65,535 along the others."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton_attention, "_load_kernels", lambda _: SimpleNamespace(attend=Kernel(), merge=Kernel()))
    monkeypatch.setattr(triton_attention, "_processors", lambda _: 50_000)
    attention = TritonAttention(replace(PLAIN, head_dim=16, max_blocks=8192))
    count = 70_000
    batch = batch_of([1] * count, [2**17] * 1000 + [1] * (count - 1000))
    attention.plan(batch)
    q, pool = torch.zeros(count, 4, 16), torch.zeros(1, 16, 2, 16)
    attention(q, pool, pool, batch, 0)
    assert attention._plan is not None and attention._plan.items > 65_535 and attention._plan.merges
    wanted = [2 * attention._plan.items, 2 * attention._plan.lines * attention._plan.merges]
    assert [math.prod(grid) for grid in grids] == wanted
    assert all(grid[0] < 2**31 and max(grid[1:], default=0) <= 65_535 for grid in grids)


# -- what there is none for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", [None, "gcc"])
def test_without_a_c_compiler_it_says_what_to_install(compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    failure: Exception = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    class Kernel:
        def __getitem__(self, _: Any) -> Any:
            raise failure

    monkeypatch.setattr(triton_attention, "_load_kernels", lambda _: SimpleNamespace(attend=Kernel()))
    monkeypatch.setattr("app.engine.attention_kernels.shutil.which", lambda name: compiler if name == "gcc" else None)
    monkeypatch.delenv("CC", raising=False)
    advice = r"^triton attention: it needs a C compiler, install gcc and libc6-dev \("
    if compiler is None:
        chosen, reasons = choose_attention("auto", PLAIN)
        assert chosen.name == "reference" and re.match(advice, str(reasons[-1])) and type(reasons[-1]) is Unavailable
        with pytest.raises(Unavailable, match=advice + "Failed to find"):
            choose_attention("triton", PLAIN)
        return
    with pytest.raises(Faulty, match="triton attention: Failed to find"):  # what is wrong is something else
        choose_attention("triton", PLAIN)
    failure = subprocess.CalledProcessError(1, ["gcc"])  # it finds no headers
    with pytest.raises(Unavailable, match=advice):
        choose_attention("triton", PLAIN)


def test_why_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, reason in (
        (PLAIN, "CUDA"),
        (replace(PLAIN, head_dim=72), "heads of 72"),
        (replace(PLAIN, head_dim=512), "heads of 512"),
        (replace(PLAIN, dtype=torch.float64), "torch.float64"),
        (replace(PLAIN, num_heads=130), "65 heads that share"),
    ):
        with pytest.raises(Unavailable, match=reason) as raised:
            TritonAttention(changed)
        assert type(raised.value) is Unavailable
    cuda = replace(PLAIN, device=torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    with pytest.raises(Unavailable, match=r"capability 8\.0, the card has 7\.5"):
        TritonAttention(cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "app.engine.triton_kernels", raising=False)
    with pytest.raises(Unavailable, match="triton is not installed"):
        TritonAttention(cuda)
    with pytest.raises(Unavailable, match="triton attention: triton is not installed"):
        choose_attention("triton", cuda)
