"""What a long stage tells its caller while it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of one stage is done."""

    stage: str
    step: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""
    """What a person who waits should know."""


COMPILING = "the first step is compiled, which takes a minute"


REPORT_EVERY = 10
"""Steps between two reports where each costs one copy from the device."""


def is_reported(step: int, total: int) -> bool:
    """Return whether a step is reported where not all of them are."""
    return step % REPORT_EVERY == 0 or step == total


ProgressCallback = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore progress."""
