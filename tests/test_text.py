"""Text around the engine: whatever way it is cut into pieces, it stays the same text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.text import REPLACEMENT, Detokenizer, StopStrings, Template
from tests.stop_oracle import cut_at_stop
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
# What "é", "€" and "😀" are made of: alone and in the wrong order they are broken UTF-8.
BYTES = sorted({i for text in "é€😀" for i in BYTE_LEVEL(text)["input_ids"]})
TOKENS = st.sampled_from(BYTES) | st.integers(0, VOCAB_SIZE - 1)  # 0 and 1 are special, so they have no text
TEXT = st.text(alphabet=" abthe\n€é😀", max_size=20)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a word carries its space, which is dropped where decoding begins."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "▁a": 1, "▁the": 2, "b": 3, "▁": 4}, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


WORDS = words_tokenizer()


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces_of(whole: Any, cuts: list[int]) -> list[Any]:
    """`whole` in pieces, some of them empty."""
    places = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 40), max_size=40)


@settings(max_examples=500, deadline=None)
@given(st.lists(TOKENS, max_size=30), CUTS)
def test_pieces_equal_the_whole_decode_broken_characters_included(token_ids: list[int], cuts: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    pieces = [detokenizer.push(part) for part in pieces_of(token_ids, cuts)]
    assert "".join(pieces) + detokenizer.flush() == decode(BYTE_LEVEL, token_ids)
    assert detokenizer.flush() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_spaces_between_words_survive_the_window(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(WORDS)
    pieces = [detokenizer.push([token]) for token in token_ids]
    assert "".join(pieces) + detokenizer.flush() == decode(WORDS, token_ids)


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_a_character_comes_out_whole_and_at_once(text: str) -> None:
    token_ids = BYTE_LEVEL(text)["input_ids"]
    detokenizer, out = Detokenizer(BYTE_LEVEL), ""
    for number, token in enumerate(token_ids, start=1):
        out += detokenizer.push([token])
        assert out == decode(BYTE_LEVEL, token_ids[:number]).rstrip(REPLACEMENT)
    assert out == text


def test_a_decode_sees_a_short_window_only() -> None:
    class Counting:
        longest = 0

        def decode(self, token_ids: list[int], **options: bool) -> str:
            self.longest = max(self.longest, len(token_ids))
            return str(BYTE_LEVEL.decode(token_ids, **options))

    counting = Counting()
    detokenizer = Detokenizer(counting)
    for token in BYTE_LEVEL("the €😀 and " * 50)["input_ids"]:
        detokenizer.push([token])
    assert counting.longest <= 8  # two characters of four bytes


STOPS = st.lists(st.text(alphabet="abc€", min_size=1, max_size=4), max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="abc€", max_size=16), STOPS, CUTS)
@example("xSTOPx", ["STOP"], [2, 3, 4])
@example("aab", ["ab"], [1, 2])  # a false start, and a true one inside it
@example("aabc", ["aabc", "b"], [])  # one stop inside another, in one piece ...
@example("aabc", ["aabc", "b"], [1, 2, 3])  # ... and in many
def test_stops_are_found_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopStrings(stops)
    out, expected = "", cut_at_stop(text, stops)
    for piece in pieces_of(text, cuts):
        out += finder.push(piece)
        assert expected[0].startswith(out), "what came out can not be taken back"
    assert (out + finder.flush(), finder.matched) == expected
    if finder.matched is not None:
        assert (finder.push("abc"), finder.flush()) == ("", ""), "text after the end"


@given(st.text(alphabet="abc€", max_size=16), STOPS)
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    out = finder.push(text)
    held = finder.flush()
    assert finder.matched is not None or out + held == text
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("template", "separator"),
    [(None, ""), ("{input}", " "), ("{input}\nMood:", " "), ("{input}\n", ""), ("{input}: ", ""), ("{input}\t", "")],
)
def test_an_answer_stands_one_space_behind_its_template(template: str | None, separator: str) -> None:
    form = Template(template)
    assert form.target("good") == separator + "good"
    assert form.answer(form.target(" good ")) == " good ", "one space, no more"
    assert form.answer("good") == "good", "a model that leaves it out loses nothing"


@given(TEXT, st.sampled_from([None, "{input}", "{input}:", "{input}\n"]))
def test_the_answer_of_a_target_is_the_answer(text: str, template: str | None) -> None:
    form = Template(template)
    assert form.answer(form.target(text)) == text


def test_an_input_is_text_and_never_a_template() -> None:
    form = Template("{input.__class__} {0} {input}!")
    assert form.prompt("{input} {x}") == "{input.__class__} {0} {input} {x}!"
    assert Template("{input}, {input}").prompt("a") == "a, a"
    assert Template().prompt("as it is") == "as it is"


@pytest.mark.parametrize("text", ["", "no placeholder", "{ input }"])
def test_a_template_without_a_place_for_the_input_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\{input\}") as caught:
        Template(text)
    assert caught.value.param == "template"
