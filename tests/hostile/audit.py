"""What a process does while it reads a file, seen by an audit hook.

A hook cannot be removed, so only programs that tests start import this module.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType

from tests.hostile.audit_sources import strange_code

_HARMLESS = {
    *("sys._getframe", "sys._getframemodulename", "sys._current_frames", "object.__getattr__", "builtins.id"),
    *("os.listdir", "os.scandir", "os.walk", "os.fwalk", "glob.glob", "glob.glob/2", "array.__new__"),
    *("pathlib.Path.glob", "pathlib.Path.rglob", "fcntl.flock"),
}
"""Events that change nothing and run nothing; every other one is recorded."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_GENERATED = re.compile(r"<eval_with_key>\.\d+")
_watching: list[list[str]] = []


def _describe(event: str, args: tuple[object, ...]) -> str | None:
    """Return what is recorded of an event; None for one that is allowed."""
    if event in _HARMLESS:
        return None
    if event == "object.__setattr__" and args[1:] == ("__name__", "GraphModule"):
        return None  # every graph has a class of its own
    if event == "open":
        path, mode, flags = args
        writes = any(letter in str(mode) for letter in "wax+") if mode else bool(int(str(flags)) & _WRITING)
        return f"open {path!r:.200} for writing" if writes else None
    if event == "exec" and isinstance(args[0], CodeType):
        name = args[0].co_filename
        return None if _GENERATED.fullmatch(name) else f"exec {name}"
    if event == "compile":
        source, name = args
        if name == "<unknown>":  # ``ast.parse`` of literals, and of code in tracebacks; to execute it would be seen
            return None
        if _GENERATED.fullmatch(str(name)):
            strange = strange_code(source if isinstance(source, str) else bytes(source or b"").decode())  # type: ignore[call-overload]
            return f"generated code: {strange}" if strange else None
        return f"compile {name} {source!r:.200}"
    return f"{event} {', '.join(f'{each!r:.100}' for each in args)}"


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watching:
        found = _watching.pop()  # what is described here must not be recorded itself
        try:
            text = _describe(event, args)
            if text is not None:
                found.append(text)
        finally:
            _watching.append(found)


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list that receives what the block does beyond computing and reading files."""
    found: list[str] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
