"""All settings of one run, and the file that starts the same run again, with a later version too."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field, model_validator

from qimera import __version__
from qimera.config.base import Settings, write_text
from qimera.config.given_images import GivenImages
from qimera.config.input_spec import InputSpec
from qimera.config.settings import DistillationSettings, QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError, describe_value
from qimera.machine.seeds import MAX_SEED

logger = logging.getLogger(__name__)

_WRITTEN_BY = "qimera"
"""Key of the version that wrote a file of settings; not one of the settings."""


_RETIRED = ("without_batch_norms",)
"""Settings of older versions that decide nothing any more."""


class RunSettings(Settings):
    """Everything that determines a run; its file starts the same run again."""

    model: str
    """``file.py:function``, or another source that ``load_model`` takes."""

    weights: str = ""
    """Path of the weights file; empty when the model brings its own."""

    recipe: str
    """Name of the recipe, or several with commas between; the first one's bank serves all."""

    seed: int = Field(0, ge=0, le=MAX_SEED)
    bank: str = ""
    """Path of a bank made earlier; empty for one of the run's own."""

    images: GivenImages | None = None
    """What is remembered of the user's images that join the bank; None where there are none."""

    logits: str = ""
    """Which of several outputs of the model holds the logits; empty if detected."""

    input: InputSpec
    synthesis: SynthesisSettings
    quantization: QuantizationSettings
    distillation: DistillationSettings
    alternatives: tuple[DistillationSettings, ...] = ()
    """Other ways to make the student from the same bank, of recipes named after the first; the student with the lowest
    estimated drop is the result."""

    @model_validator(mode="after")
    def _check(self) -> "RunSettings":
        names = self.recipe.split(",")
        if self.alternatives and len(names) != 1 + len(self.alternatives):
            raise ValueError(
                f"recipe must name distillation and each of the {len(self.alternatives)} alternatives, with commas "
                f"between, given {self.recipe!r}"
            )
        return self

    def save(self, path: Path | str) -> None:
        """Write every field, defaults too, and the version of qimera, as indented JSON."""
        values = {_WRITTEN_BY: __version__, **self.model_dump(mode="json")}
        write_text(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "RunSettings":
        """Read settings from a JSON file that ``save`` wrote, or a person.

        What an older version did not write takes its default, and a warning says so.

        Raises:
            ConfigError: a value is wrong, or of a setting that this version does not have.
        """
        try:
            values = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a file of settings: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: not a file of settings, but {describe_value(values)}")
        writer = values.pop(_WRITTEN_BY, None)
        for name in _RETIRED:
            values.pop(name, None)
        try:
            settings = cls.model_validate(values)
        except ConfigError as error:
            by = f" (written by qimera {writer}, this is {__version__})" if writer else ""
            raise ConfigError(f"{path}{by}: {error}") from None
        absent = list(_defaults(settings)) if writer else []
        if absent:
            logger.warning("%s: of qimera %s, which did not have %s", path, writer, ", ".join(absent))
        return settings


def _defaults(settings: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the name and the value of each setting that was not given."""
    for name, value in settings:
        if name not in settings.model_fields_set:
            yield f"{prefix}{name} (now {value!r})"
        elif isinstance(value, BaseModel):
            yield from _defaults(value, f"{prefix}{name}.")
