"""The models of what qimera writes -> JSON schemas."""

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from qimera.cli.results import PRINTED
from qimera.report.summary import Summary


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON schema of ``summary.json``, or of what the command ``name`` prints with ``--json``."""
    written: TypeAdapter[Any] = TypeAdapter(Summary) if name == "summary" else PRINTED[name]
    title = "summary.json" if name == "summary" else f"qimera {name} --json"
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": title, **_in_plain_text(written.json_schema())}


def _in_plain_text(schema: Any) -> Any:
    """Return a schema without pydantic's titles, and with descriptions as text instead of docstrings."""
    if isinstance(schema, list):
        return [_in_plain_text(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _in_plain_text(value) for name, value in schema.items() if name != "title" or isinstance(value, dict)}
    if isinstance(text := kept.get("description"), str):
        kept["description"] = " ".join(text.split()).replace("``", "`")
    return kept
