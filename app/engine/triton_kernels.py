# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The device's side of app.engine.triton_attention, which says what `work` holds. Importing it needs Triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q,  # [queries, KV_HEADS * GROUP, DIM], queries `q_stride` apart
    k,  # [blocks, PAGE, KV_HEADS, DIM]
    v,
    out,  # [queries, KV_HEADS * GROUP, DIM]
    partial,  # float32 [slots, KV_HEADS, LINES, DIM_PAD]
    logs,  # float32 [slots, KV_HEADS, LINES]
    work,
    cu_queries,
    num_keys,
    tables,  # int32, rows `table_stride` apart
    table_stride,
    q_stride,
    scale,  # with log2(e), because exp2 is what the hardware has
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item: a tile of LINES lines (queries times the heads of one key head) over its part of their keys."""
    program = tl.program_id(0)  # one axis: CUDA allows 65,535 along the others
    head = program % KV_HEADS
    item = work + program // KV_HEADS * 5
    row = tl.load(item)
    if row < 0:
        return
    first, part, parts, slot = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    start = tl.load(cu_queries + row)
    count = tl.load(cu_queries + row + 1) - start
    length = tl.load(num_keys + row)
    line = tl.arange(0, LINES)
    query = first + line // GROUP_PAD
    lane = line % GROUP_PAD
    position = length - count + query
    dim = tl.arange(0, DIM_PAD)
    asked = ((query < count) & (lane < GROUP))[:, None] & (dim < DIM)[None, :]
    token = (start + query).to(tl.int64)
    of_head = (head * GROUP + lane)[:, None] * DIM + dim[None, :]
    queries = tl.load(q + token[:, None] * q_stride + of_head, mask=asked, other=0.0)

    begin = 0
    end = tl.minimum(length, length - count + first + LINES // GROUP_PAD)  # what the tile's last query sees
    if WINDOW > 0:
        begin = tl.maximum(length - count + first - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(end - begin, parts), KEYS) * KEYS
    begin += part * share
    end = tl.minimum(begin + share, end)

    top = tl.full([LINES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([LINES], dtype=tl.float32)
    found = tl.zeros([LINES, DIM_PAD], dtype=tl.float32)
    table = tables + row.to(tl.int64) * table_stride
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)  # a large cache has 2**31 numbers
        slots = ((block * PAGE + key % PAGE) * KV_HEADS + head) * DIM
        # Zeros behind the end: a weight of 0 would not make what is not a number go away.
        wanted = inside[:, None] & (dim < DIM)[None, :]
        keys = tl.load(k + slots[:, None] + dim[None, :], mask=wanted, other=0.0)
        values = tl.load(v + slots[:, None] + dim[None, :], mask=wanted, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        distance = position[:, None] - key[None, :]
        seen = distance >= 0  # so nothing behind `end` either: a part that is not the last ends with a turn
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a line may have seen no key yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        found = found * fade[:, None]
        found = tl.dot(weights.to(values.dtype), values, found, input_precision=PRECISION)
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)
    found = found / total[:, None]
    if parts == 1:
        to = out + token[:, None] * (KV_HEADS * GROUP * DIM) + of_head
        tl.store(to, found.to(out.dtype.element_ty), mask=asked)
    else:
        kept = (slot.to(tl.int64) * KV_HEADS + head) * LINES + line
        tl.store(partial + kept[:, None] * DIM_PAD + dim[None, :], found)
        tl.store(logs + kept, top + tl.log2(total))  # -inf where the part has nothing that the line sees


@triton.jit(do_not_specialize=["offset"])
def merge(
    out,
    partial,
    logs,
    work,
    offset,  # of the merges in `work`
    cu_queries,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LINES: tl.constexpr,
    USED: tl.constexpr,  # lines of a tile that can have a query
    PARTS: tl.constexpr,  # read at a time
):
    """One line of a tile whose keys were cut into parts."""
    program = tl.program_id(0)
    head, line = program // USED % KV_HEADS, program % USED
    item = work + offset + program // (USED * KV_HEADS) * 4
    row = tl.load(item)
    if row < 0:
        return
    first, parts, slot = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    start = tl.load(cu_queries + row)
    query, lane = first + line // GROUP_PAD, line % GROUP_PAD
    if (query >= tl.load(cu_queries + row + 1) - start) | (lane >= GROUP):
        return
    dim = tl.arange(0, DIM_PAD)
    top = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    found = tl.zeros([DIM_PAD], dtype=tl.float32)
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        kept = ((slot + part).to(tl.int64) * KV_HEADS + head) * LINES + line
        log = tl.load(logs + kept, mask=part < parts, other=float("-inf"))
        results = tl.load(partial + kept[:, None] * DIM_PAD + dim[None, :], mask=(part < parts)[:, None], other=0.0)
        # Finite from the first time on: a window leaves a line without keys for a tile's queries at most, and so many
        # parts have more.
        new_top = tl.maximum(top, tl.max(log, 0))
        weights = tl.exp2(log - new_top)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 0)
        found = found * fade + tl.sum(weights[:, None] * results, 0)
        top = new_top
    to = out + (start + query).to(tl.int64) * (KV_HEADS * GROUP * DIM) + (head * GROUP + lane) * DIM + dim
    tl.store(to, (found / total).to(out.dtype.element_ty), mask=dim < DIM)
