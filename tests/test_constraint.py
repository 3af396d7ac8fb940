"""JSON by grammar: what is written under a schema fits it, and a hostile schema costs little. Oracle: pydantic."""

from __future__ import annotations

import json
import random
import resource
import threading
import time
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from app.base_model import BaseModel
from app.constraint import ConstraintCompiler, JsonConstraint
from app.engine import SamplingParams
from app.engine.sampler import Sampled, SamplingRow, sample
from app.errors import EngineFailed, InvalidRequest, Overloaded
from tests.tiny import VOCAB_SIZE, tiny_tokenizer


class Shape(PydanticModel):
    model_config = ConfigDict(extra="forbid")  # else more and more properties may follow


class Mood(Enum):
    good = "good"
    bad = "bad"


class Person(Shape):
    name: str = Field(max_length=8)
    age: Annotated[int, Field(ge=0, le=130)]
    mood: Mood | None = None


class Code(Shape):
    code: str = Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")
    kind: Literal["a", 'quote " and \\', "€"]
    ok: bool


class Team(Shape):
    people: list[Person] = Field(min_length=1, max_length=3)
    lead: Person
    codes: list[Code] = Field(max_length=2)
    nothing: None


class Tree(Shape):
    left: Tree | None
    value: Literal[1, 2]


@pytest.fixture(scope="module")
def compiler() -> ConstraintCompiler:
    return ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)


def write(
    constraint: JsonConstraint, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seed: int, limit: int = 3000
) -> str:
    """What a model of no sense at all writes under the constraint."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    ids: list[int] = []
    params = SamplingParams(max_tokens=limit)
    while len(ids) < limit:
        logits = 2 * torch.randn(1, vocab_size, generator=generator)
        (found,) = sample(logits, [SamplingRow(params, rng.random(), ids, 0, constraint)])
        assert isinstance(found, Sampled), found
        if found.id in tokenizer.all_special_ids:
            break
        ids.append(found.id)
        if constraint.accept(found.id):
            break
    else:
        raise AssertionError(f"no end: {tokenizer.decode(ids)[:200]}")
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def tokens(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False)
    return ids


def allowed(constraint: JsonConstraint, vocab_size: int = VOCAB_SIZE) -> set[int]:
    words = constraint.mask()
    assert words.dtype == torch.int32 and words.shape == (-(-vocab_size // 32),)
    return {i for i in range(32 * len(words)) if int(words[i // 32]) >> (i % 32) & 1}


@pytest.mark.parametrize("shape", [Person, Code, Team, Tree])
def test_what_is_written_fits_the_schema(compiler: ConstraintCompiler, shape: type[Shape]) -> None:
    for seed in range(2):
        text = write(compiler.json_schema(shape.model_json_schema()), tiny_tokenizer(), VOCAB_SIZE, seed)
        shape.model_validate_json(text)
        assert text == text.strip()


@pytest.mark.model
@pytest.mark.parametrize("shape", [Code, Team])
def test_what_is_written_with_the_default_tokenizer_fits_the_schema(
    default_base: BaseModel, shape: type[Shape]
) -> None:
    base = default_base
    compiler = ConstraintCompiler(base.tokenizer, base.eos_token_ids, base.info.vocab_size)
    for seed in range(1):
        text = write(compiler.json_schema(shape.model_json_schema()), base.tokenizer, base.info.vocab_size, seed)
        shape.model_validate_json(text)


def test_any_object(compiler: ConstraintCompiler) -> None:
    lengths = set()
    for seed in range(5):
        constraint = compiler.json_object()
        for token in tokens('{"a": '):
            assert not constraint.accept(token)
        try:
            text = '{"a": ' + write(constraint, tiny_tokenizer(), VOCAB_SIZE, seed, limit=150)
        except AssertionError:
            continue  # strings have no limit
        lengths.add(len(text))
        assert "a" in json.loads(text)
    assert len(lengths) > 1


def test_the_mask_is_exactly_what_is_accepted(compiler: ConstraintCompiler) -> None:
    for text in ("", '{"name": "', '{"name": "x", "age": 1', '{"name": "x", "age": 13, "mood": '):
        constraint = compiler.json_schema(Person.model_json_schema())
        for token in tokens(text):
            constraint.accept(token)
        mask = allowed(constraint)
        assert mask
        for token in range(VOCAB_SIZE):
            if token in mask:
                constraint.clone().accept(token)
            else:
                with pytest.raises(EngineFailed):
                    constraint.clone().accept(token)


def test_the_end_is_allowed_when_the_text_is_complete(compiler: ConstraintCompiler) -> None:
    constraint = compiler.json_schema({"type": "integer"})
    assert 0 not in allowed(constraint)
    (one,) = tokens("1")
    assert not constraint.accept(one), "another digit may follow"
    assert {0, one} <= allowed(constraint)

    constraint = compiler.json_schema({"const": [1]})
    *first, last = tokens("[1]")
    assert [constraint.accept(token) for token in first] == [False] * len(first)
    assert 0 not in allowed(constraint)
    assert constraint.accept(last)
    assert allowed(constraint) == {0}


def test_constraints_of_one_schema_are_independent(compiler: ConstraintCompiler) -> None:
    schema = Person.model_json_schema()
    first, second = compiler.json_schema(schema), compiler.json_schema(schema)
    start = allowed(second)
    for token in tokens('{"na'):
        first.accept(token)
    copy = first.clone()
    assert allowed(second) == start and allowed(copy) == allowed(first) != start
    for token in tokens('me": "'):
        copy.accept(token)
    assert allowed(copy) != allowed(first)


@pytest.mark.parametrize("vocab_size", [100, 129, 200, 1000])
def test_a_model_may_have_more_tokens_than_its_tokenizer_or_fewer(vocab_size: int) -> None:
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, vocab_size)
    mask = allowed(compiler.json_schema({"type": "string"}), vocab_size)
    assert mask and max(mask) < VOCAB_SIZE
    found = sample(torch.randn(1, vocab_size), [SamplingRow(SamplingParams(), 0.5, [], 0, compiler.json_object())])
    assert isinstance(found[0], Sampled)


def nested(depth: int, keyword: str = "items") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    while depth := depth - 1:
        schema = (
            {"items": schema}
            if keyword == "items"
            else {"pattern": f"a{depth}.*b", "anyOf": [schema, {"pattern": "c"}]}
        )
    return schema


def doubling(keyword: str, depth: int = 30) -> dict[str, Any]:
    """A few references that stand for 2^30 schemas."""
    references = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": references | {f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


MANY_PROPERTIES = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1000)}}
REFUSED: dict[str, dict[str, Any]] = {
    "a megabyte": {"type": "object", "description": "x" * 10**6},
    "enum of 100000": {"enum": [f"value {i}" for i in range(10**5)]},
    "deep": nested(200),
    "deeper than Python": nested(10**4),
    "itself": {"$ref": "#"},
    "in a circle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "http": {"$ref": "http://127.0.0.1:9/schema.json"},
    "http by base": {"$id": "http://127.0.0.1:9/", "$ref": "other.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "patterns at once": {"allOf": [{"type": "string", "pattern": f"a{i}.*"} for i in range(40)]},
    "patterns in layers": nested(25, "anyOf"),
    "product": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {"type": "null"}}} for j in range(10)]}
            for i in range(30)
        ]
    },
    "look-around": {"type": "string", "pattern": "^(?=.*a)(?!b).*$"},
    "bad pattern": {"type": "string", "pattern": "("},
    "not a type": {"type": "strong"},
    "never": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "empty range": {"type": "integer", "minimum": 5, "maximum": 3},
    "many properties": MANY_PROPERTIES,
    "many properties of items": {"type": "array", "items": MANY_PROPERTIES},
    "unsupported": {"not": {"type": "string"}},
    "unsupported items": {"type": "array", "uniqueItems": True},
    "NaN": {"const": float("nan")},
    "no JSON": {"const": {1, 2}},
    "surrogate": {"const": "\ud800"},
}
TAKEN: dict[str, dict[str, Any]] = {
    "nested repetition": {"type": "string", "pattern": "(a+)+$"},
    "repeated repetition": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}b$"},
    "exponential automaton": {"type": "string", "pattern": "^(a|b)*a(a|b){20}$"},
    "wide automaton": {"type": "string", "pattern": "^.*(a|b).{500}$"},
    "long string": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "long list": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "large enum": {"enum": [f"v{i * 7919}" for i in range(4000)]},
    "doubling anyOf": doubling("anyOf"),
    "doubling allOf": doubling("allOf"),
    "tree": Tree.model_json_schema(),
    "draft 7": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"},
    "options": {"type": "object", "x-guidance": {"whitespace_pattern": "(a+)+", "lenient": True}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_used_is_refused_soon(compiler: ConstraintCompiler, name: str) -> None:
    started = cpu_seconds()
    with pytest.raises(InvalidRequest, match="JSON schema") as caught:
        compiler.json_schema(REFUSED[name])
    assert caught.value.param == "response_format"
    assert len(caught.value.message) < 300 and "\n" not in caught.value.message
    assert cpu_seconds() - started < 2


@pytest.mark.parametrize("name", TAKEN)
def test_a_schema_that_looks_dangerous_costs_little(compiler: ConstraintCompiler, name: str) -> None:
    started = cpu_seconds()
    constraint = compiler.json_schema(TAKEN[name])
    assert cpu_seconds() - started < 2
    rng = random.Random(name)
    for _ in range(40):  # and so does every step under it
        started = time.thread_time()
        mask = allowed(constraint)
        try:
            done = constraint.accept(rng.choice(sorted(mask)))
        except InvalidRequest as error:
            assert "max is" in error.message
            done = True
        assert time.thread_time() - started < 0.25
        if done:
            break


def cpu_seconds() -> float:
    """Of this process and those it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@pytest.mark.parametrize("options", [{"whitespace_flexible": True}, {"json_allowed_escapes": "n"}], ids=str)
def test_options_in_the_schema_are_not_taken(compiler: ConstraintCompiler, options: dict[str, Any]) -> None:
    schema = {"type": "array"}
    plain, other = compiler.json_schema(schema), compiler.json_schema(schema | {"x-guidance": options})
    for token in tokens('["\\'):
        assert allowed(other) == allowed(plain)
        plain.accept(token)
        other.accept(token)
    assert allowed(other) == allowed(plain)


def test_compiled_schemas_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.constraint.MAX_CACHED", 4)
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)
    for i in range(6):
        compiler.json_schema({"const": i})
    started = cpu_seconds()
    for i in range(2, 6):
        compiler.json_schema({"const": i})
    assert cpu_seconds() - started < 0.05
    assert len(compiler._compiled) == 4


def test_refusals_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.constraint.MAX_REFUSALS", 2)
    trials: list[str] = []

    def refuse(grammar: str) -> None:
        trials.append(grammar)
        raise InvalidRequest(f"no, for the {len(trials)}. time", param="response_format")

    monkeypatch.setattr("app.constraint._try", refuse)
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)

    def refusal(ask: Any, number: int) -> str:
        with pytest.raises(InvalidRequest) as caught:
            ask({"const": number})
        assert caught.value.param == "response_format"
        return caught.value.message

    assert compiler.find({"const": 1}) is None
    assert refusal(compiler.json_schema, 1) == refusal(compiler.json_schema, 1) == refusal(compiler.find, 1)
    assert len(trials) == 1
    refusal(compiler.json_schema, 2)
    refusal(compiler.find, 1)  # now 2 is the oldest
    refusal(compiler.json_schema, 3)
    refusal(compiler.json_schema, 1)
    assert len(trials) == 3
    refusal(compiler.json_schema, 2)
    assert len(trials) == 4 and len(compiler._refusals) == 2


def test_a_schema_that_many_ask_for_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[str] = []
    start = threading.Barrier(8)

    def refuse(grammar: str) -> None:
        trials.append(grammar)
        time.sleep(0.05)
        raise InvalidRequest("no", param="response_format")

    monkeypatch.setattr("app.constraint._try", refuse)
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)

    def ask() -> None:
        start.wait()
        with pytest.raises(InvalidRequest):
            compiler.json_schema({"const": 1})

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trials) == 1


def test_a_machine_that_is_too_busy_is_not_the_schemas_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)
    with monkeypatch.context() as patch:
        patch.setattr("app.constraint.TRIAL_SECONDS", 0)
        with pytest.raises(Overloaded):
            compiler.json_schema({"const": 1})
    assert compiler.json_schema({"const": 1}).mask().any()


def test_threads_share_a_compiler() -> None:
    compiler = ConstraintCompiler(tiny_tokenizer(), {0}, VOCAB_SIZE)
    found: list[str] = []

    def work(seed: int) -> None:
        constraint = compiler.json_schema(Code.model_json_schema() | {"title": str(seed % 2)})
        found.append(write(constraint, tiny_tokenizer(), VOCAB_SIZE, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([Code.model_validate_json(text) for text in found]) == 6
