"""What all settings share: frozen, no unknown fields, and errors that name the field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qimera.errors import ConfigError

_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """Frozen, without unknown fields; a wrong value raises ConfigError instead of pydantic's own error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self).__name__, error)) from None

    def model_copy(self: _S, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> _S:
        """Return a copy with the values of ``update``, which are checked as those of new settings are.

        Raises:
            ConfigError: a value is wrong, or of a setting that is not there.
        """
        copied = super().model_copy(deep=deep)
        if not update:
            return copied
        given = {name: getattr(copied, name) for name in copied.model_fields_set}
        return type(self)(**{**given, **update})

    @classmethod
    def load(cls: type[_S], path: Path | str) -> _S:
        """Read settings from a JSON file written by ``save``."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            raise ConfigError(f"{path}: {_explain(cls.__name__, error)}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write every field, defaults too, as indented JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")


def _explain(name: str, error: ValidationError) -> str:
    problems = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"]) or name
        unknown = detail["type"] == "extra_forbidden"
        message = "there is no such setting" if unknown else detail["msg"].removeprefix("Value error, ")
        given = "" if detail["type"] in ("value_error", "missing") else f", given {detail['input']!r}"
        problems.append(f"{field}: {message}{given}")
    return f"{name}: " + "; ".join(problems)
