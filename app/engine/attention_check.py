"""What an attention kernel must show before it is used: the numbers of the reference, on the shapes it will serve."""

from __future__ import annotations

import torch

from app.engine.paged_attention import Geometry, PagedAttention, ReferenceAttention, paged_batch

_TOLERANCE = 3e-2  # of outputs of about 1, in bfloat16
_WINDOWS = range(513, 8193)  # that get a row of their own: others are exceeded anyway, or take too much memory


class Unavailable(Exception):
    """The implementation is not used; the message says why. This machine or model cannot have it, see also `Faulty`."""


class Faulty(Unavailable):
    """It exists for this machine and model, but it failed or differs from the reference: something is wrong."""


@torch.inference_mode()
def check_attention(attention: PagedAttention, geometry: Geometry) -> None:
    """Compare with the reference, on a pool whose unused positions are not numbers. Raises Faulty."""
    g, size = geometry, geometry.block_size
    most = g.max_blocks * size
    # Ends in, at and just behind a block's end, as far as the model goes; long enough for a kernel to split the keys.
    lengths = [min(n, most) for n in (1, size, size + 1, 2 * size + 3, 700, 1300)]
    short = range(len(lengths))
    # Rows that exceed a window by little are each alone: of a batch, the reference wants memory for the longest.
    exceeded = [window for window in g.windows if window in _WINDOWS and window < most]
    lengths += [min(window + size + 2, most) for window in exceeded]
    tables: list[list[int]] = []
    for length in lengths:
        first = 1 + sum(map(len, tables))
        tables.append(list(range(first, first - (-length // size)))[::-1])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(g.device, g.dtype)

    pool = torch.full(
        (2, 1 + sum(map(len, tables)), size, g.num_kv_heads, g.head_dim), torch.nan, dtype=g.dtype, device=g.device
    )
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        # The mean of so many values is small, and one too many would not show.
        scale = 1.0 if row in short else 0.5 * length**0.5
        for i, block in enumerate(table):
            filled = min(size, length - i * size)
            pool[0, block, :filled] = random(filled, g.num_kv_heads, g.head_dim)
            pool[1, block, :filled] = random(filled, g.num_kv_heads, g.head_dim) * scale
    reference = ReferenceAttention(geometry)
    exact = pool.float()
    for rows, query_lens, static, windows in (
        (short, [min(n, length) for n, length in zip((1, 1, 7, 1, 33, 1), lengths, strict=False)], False, g.windows),
        (short, [1] * len(short), False, g.windows),
        (short, [1] * len(short), attention.graphs, g.windows),
        *(([row], [n], False, (window,)) for row, window in enumerate(exceeded, len(short)) for n in (5, 1)),
    ):
        taken = ([lengths[row] for row in rows], [tables[row] for row in rows])
        batch = paged_batch(query_lens, *taken, g.device, static=static)
        plain = paged_batch(query_lens, *taken, g.device)
        q = random(sum(query_lens), g.num_heads, g.head_dim)
        attention.plan(batch)
        reference.plan(plain)
        for window in windows:
            ours = attention(q, pool[0], pool[1], batch, window).float()
            theirs = reference(q.float(), exact[0], exact[1], plain, window)
            error = float((ours - theirs).abs().max())
            # Rounding is of what comes out, which with great values and a sharp softmax is more than 1.
            limit = _TOLERANCE if rows is short else _TOLERANCE * max(1.0, float(theirs.abs().max()))
            if not error < limit:
                kind = "static" if static else "ragged" if max(query_lens) > 1 else "single"
                raise Faulty(f"differs from the reference by {error:.3g} ({kind} batch, window {window})")
