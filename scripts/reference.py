"""Write docs/reference.md from the OpenAPI document: `python -m scripts.reference`; a test holds the file to it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
_TAGS = {"openai": "For OpenAI's clients"}
METHODS = ("get", "post", "put", "delete")
_HEAD = """# HTTP reference

Made from the server's own OpenAPI document (`/openapi.json`; `/docs` shows it and tries it) by `python -m
scripts.reference`. Errors have one body everywhere: the members of RFC 9457, and OpenAI's `error` beside them.
"""


def render(document: dict[str, Any]) -> str:
    """The document as Markdown: operations by tag, then the objects that they take and give."""
    parts = [_HEAD]
    tags: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if operation := item.get(method):
                tags.setdefault(operation["tags"][0], []).append("\n".join(_operation(method, path, operation)))
    for tag, operations in tags.items():
        parts += [f"## {_TAGS.get(tag, tag.capitalize())}\n", *operations]
    schemas = document["components"]["schemas"]
    parts.append("## Objects\n")
    parts += ["\n".join(_object(name, schemas[name])) for name in sorted(schemas)]
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}\n"
    yield operation.get("description", operation["summary"]) + "\n"
    yield f"Key: {_key(operation)}.\n"
    if parameters := operation.get("parameters"):
        yield "| parameter | in | type | |"
        yield "|---|---|---|---|"
        for parameter in parameters:
            what = _cell(parameter.get("description") or parameter["schema"].get("description", ""))
            need = " **required**" if parameter.get("required") and parameter["in"] != "path" else ""
            yield f"| `{parameter['name']}` | {parameter['in']} | {_type(parameter['schema'])} | {what}{need} |"
        yield ""
    if body := operation.get("requestBody"):
        yield f"Body: {_content(body['content'])}\n"
    for status, reply in operation["responses"].items():
        if status in ("4XX", "5XX"):
            continue
        content = _content(reply["content"]) if reply.get("content") else ""
        yield f"{status}: {content or reply['description'].lower()}\n"


def _key(operation: dict[str, Any]) -> str:
    if "security" not in operation:
        return "none"
    return f"scope `{operation['x-scope']}`" if "x-scope" in operation else "any"


def _content(content: dict[str, Any]) -> str:
    return ", ".join(
        f"`{kind}`" + (f" {_type(media['schema'])}" if media.get("schema") else "") for kind, media in content.items()
    )


def _object(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield schema["description"] + "\n"
    if "properties" not in schema:
        yield _type(schema) + "\n"
        return
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for field, found in schema["properties"].items():
        required = "required" if field in schema.get("required", ()) else ""
        default = f"`{json.dumps(found['default'])}`" if "default" in found else required
        yield f"| `{field}` | {_type(found)} | {default} | {_cell(found.get('description', ''))} |"
    yield ""


def _type(schema: dict[str, Any]) -> str:
    """In a few words; a schema that has a name, by its name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}{_limits(schema, 'Items')}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    return f"{kind}{_limits(schema, 'Length')}{_range(schema)}"


def _limits(schema: dict[str, Any], what: str) -> str:
    least, most = schema.get(f"min{what}"), schema.get(f"max{what}")
    unit = "characters" if what == "Length" else "items"
    if not least and most is None:
        return ""
    return f" ({f'at least {least}' if most is None else f'{least} to {most}' if least else f'at most {most}'} {unit})"


def _range(schema: dict[str, Any]) -> str:
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[name]:.20g}" for name, sign in names.items() if name in schema]
    return f" ({', '.join(found)})" if found else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    from tests.api_harness import Harness  # an application without a base model

    with tempfile.TemporaryDirectory() as folder:
        PATH.write_text(render(Harness.create(Path(folder) / "prompts").app.openapi()))


if __name__ == "__main__":
    main()
