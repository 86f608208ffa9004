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
    return {"$schema": GenerateJsonSchema.schema_dialect, **written.json_schema(), "title": title}
