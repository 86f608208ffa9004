"""What all settings share: frozen, no unknown fields, and errors that name the field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qimera.errors import ConfigError, suggest
from qimera.machine.files import make_folder

_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """Frozen, without unknown fields; a wrong value raises ConfigError instead of pydantic's own error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def replace(self: _S, **changes: object) -> _S:
        """Return a copy with other values for the settings in ``changes``.

        Raises:
            ConfigError: a value is wrong, or there is no such setting.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    def model_copy(self: _S, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> _S:
        """``replace``, by pydantic's name for it; pydantic itself would not check the values.

        Raises:
            ConfigError: a value is wrong, or there is no such setting.
        """
        return super().model_copy(deep=deep).replace(**update) if update else super().model_copy(deep=deep)

    @classmethod
    def load(cls: type[_S], path: Path | str) -> _S:
        """Read settings from a JSON file written by ``save``."""
        return cls.from_json(Path(path).read_bytes(), path)

    @classmethod
    def from_json(cls: type[_S], text: str | bytes, path: Path | str) -> _S:
        """Return the settings in ``text``, which stands in the file ``path``.

        Raises:
            ConfigError: the text is no JSON, or a value in it is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{path}: {_explain(cls, error)}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write every field, defaults too, as indented JSON; the folder is made if it is not there."""
        write_text(path, self.model_dump_json(indent=2) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a file, and make its folder if it is not there."""
    make_folder(Path(path).parent)
    Path(path).write_text(text, encoding="utf-8")


def _explain(settings: type[BaseModel], error: ValidationError) -> str:
    problems = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"])
        unknown = detail["type"] == "extra_forbidden"
        message = "there is no such setting" if unknown else detail["msg"].removeprefix("Value error, ")
        if unknown and len(detail["loc"]) == 1:
            message += suggest(field, settings.model_fields)
        given = "" if unknown or detail["type"] in ("value_error", "missing") else f", given {detail['input']!r}"
        problems.append(f"{field}: {message}{given}" if field else message)
    return f"{settings.__name__}: " + "; ".join(problems)
