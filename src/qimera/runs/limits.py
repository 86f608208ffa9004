"""Limits that a caller sets -> an error for results that exceed them."""

from collections.abc import Sequence
from dataclasses import dataclass

from qimera.errors import VerificationError


@dataclass(frozen=True)
class Result:
    """A result, as far as limits are concerned."""

    name: str
    warnings: Sequence[str]
    drop: float | None = None
    """In points; None without a figure to trust."""

    kind: str = "estimated"
    """``estimated`` or ``measured``."""


@dataclass(frozen=True)
class Limits:
    """Options ``--strict`` and ``--max-drop``."""

    strict: bool = False
    max_drop: float | None = None

    def check(self, *results: Result) -> None:
        """Accept the results.

        Raises:
            VerificationError: a result has warnings, or its drop is too large or unknown.
        """
        reasons = [reason for result in results for reason in self._reasons(result)]
        if reasons:
            raise VerificationError("; ".join(reasons))

    def _reasons(self, result: Result) -> list[str]:
        reasons = []
        if self.strict and result.warnings:
            count = len(result.warnings)
            found = "1 warning, shown above" if count == 1 else f"{count} warnings, shown above"
            reasons.append(f"--strict: {result.name} has {found}")
        if self.max_drop is not None and result.drop is None:
            reasons.append(
                f"--max-drop: {result.name} has no {result.kind} drop to compare with {self.max_drop:g} points"
            )
        elif self.max_drop is not None and result.drop is not None and result.drop > self.max_drop:
            reasons.append(
                f"--max-drop: {result.name} loses {result.drop:.2f} points ({result.kind}), more than {self.max_drop:g}"
            )
        return reasons
