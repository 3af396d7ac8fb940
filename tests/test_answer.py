"""The text of an answer, by definition: decode all, take off the separator, cut at the stop that is whole first."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from app.answer import Answer, Piece
from app.engine import SamplingParams
from app.text import Template
from tests.fake_engine import FakeEngine
from tests.stop_oracle import cut_at_stop
from tests.tiny import tiny_base

TEXT = st.text(alphabet=" abthe\n€é😀", max_size=12)
STOPS = st.lists(st.text(alphabet=" abthe\n€", min_size=1, max_size=3), max_size=3)
TEMPLATES = st.sampled_from([None, "{input}", "{input}:", "{input}:\n"])


def read(text: str, stops: list[str], template: Template, max_tokens: int) -> tuple[list[Piece], int]:
    """The pieces of an answer and the number of tokens it counted."""

    async def main() -> tuple[list[Piece], int]:
        tokenizer = tiny_base("llama").tokenizer
        engine = FakeEngine(tokenizer(text)["input_ids"])
        generation = engine.generate(None, [1], SamplingParams(max_tokens=max_tokens))
        answer = Answer(generation, tokenizer, template, stops)
        pieces: list[Piece] = []

        async def deliver(piece: Piece) -> None:
            pieces.append(piece)

        await answer.read(deliver)
        [call] = engine.calls
        assert call.releases == 1
        assert answer.num_tokens <= call.taken
        return pieces, answer.num_tokens

    return asyncio.run(main())


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS, TEMPLATES, st.integers(1, 20))
def test_pieces_make_the_defined_text(text: str, stops: list[str], template: str | None, max_tokens: int) -> None:
    tokenizer = tiny_base("llama").tokenizer
    chosen = Template(template)
    ids = tokenizer(text)["input_ids"]
    whole = chosen.answer(tokenizer.decode(ids[:max_tokens]))
    expected, matched = cut_at_stop(whole, stops)

    pieces, num_tokens = read(text, stops, chosen, max_tokens)
    assert "".join(piece.text for piece in pieces) == expected
    assert all(piece.text for piece in pieces[:-1]), "an empty piece is no event"
    reasons = [piece.finish_reason for piece in pieces]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == ("stop" if matched or len(ids) < max_tokens else "length")
    assert num_tokens <= min(len(ids), max_tokens)
    if not matched:
        assert num_tokens == min(len(ids), max_tokens)
