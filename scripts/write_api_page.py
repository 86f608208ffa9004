"""Write docs/api.md from the docstrings of the public names; with --check, only say whether it is up to date."""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import qimera

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
OTHER_MODULES = (
    "qimera.export.other_quantizers",
    "qimera.teacher.sources",
    "qimera.synthesis.formats",
    "qimera.runs.reporting",
)


def main() -> None:
    """Write the page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE} is out of date: python scripts/write_api_page.py")


def page() -> str:
    """Return the text of the page."""
    parts = ["# API\n\nWritten by `scripts/write_api_page.py` from the docstrings.\n"]
    parts += [_entry(f"qimera.{name}", getattr(qimera, name)) for name in sorted(qimera.__all__, key=str.lower)]
    for module_name in OTHER_MODULES:
        module = importlib.import_module(module_name)
        own = [(name, value) for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        parts += [_entry(f"{module_name}.{name}", value) for name, value in own if not name.startswith("_")]
    return "\n".join(parts)


def _entry(name: str, value: object) -> str:
    if inspect.isfunction(value):
        parameters = [_parameter(each) for each in inspect.signature(value).parameters.values()]
        return f"## {name}\n\n`{name.rpartition('.')[2]}({', '.join(parameters)})`\n\n{_text(value)}\n"
    if not inspect.isclass(value):
        return f"## {name}\n\n`{value!r}`\n"
    methods = [
        f"- `{key}({', '.join(map(_parameter, _parameters(method)))})`: {_text(method).partition(chr(10))[0]}"
        for key, method in vars(value).items()
        if not key.startswith("_") and callable(getattr(value, key, None)) and inspect.getdoc(getattr(value, key))
    ]
    fields = [
        f"- `{key}`: {' '.join((field.description or '').split())}".rstrip(": ")
        for key, field in getattr(value, "model_fields", {}).items()
    ]
    return "\n\n".join(filter(None, [f"## {name}", _text(value), "\n".join(fields), "\n".join(methods)])) + "\n"


def _parameters(method: object) -> list[inspect.Parameter]:
    function = getattr(method, "__func__", method)
    return [each for each in inspect.signature(function).parameters.values() if each.name not in ("self", "cls")]


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = "" if parameter.default is parameter.empty else "=" + _short(parameter.default)
    return f"{star}{parameter.name}{default}"


def _short(value: object) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def _text(value: object) -> str:
    text = inspect.getdoc(getattr(value, "__func__", value)) or ""
    lines, in_list = [], False
    for line in text.splitlines():
        if line in ("Args:", "Raises:", "Returns:", "Yields:"):
            in_list = True
            lines += [f"**{line[:-1]}**", ""]
        elif in_list and line.startswith("    ") and not line.startswith("     "):
            lines.append(f"- {line.strip()}")
        else:
            lines.append(f"  {line.strip()}" if in_list and line.strip() else line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
