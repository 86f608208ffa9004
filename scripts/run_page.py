"""Run the Python blocks of a page in order, and write what each one prints into the block behind it.

    python -m scripts.run_page docs/ablation.md

With --check nothing is written: the page fails if a block prints other lines. Numbers may differ between machines.
"""

import argparse
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)


def main() -> None:
    """Run the page, and write it anew or say what it would say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a block prints other lines")
    given = parser.parse_args()
    before = given.page.read_text(encoding="utf-8")
    after = executed(before)
    if not given.check:
        given.page.write_text(after, encoding="utf-8")
    elif shape(after) != shape(before):
        sys.exit(f"{given.page} is out of date: python -m scripts.run_page {given.page}")


def executed(page: str) -> str:
    """Return the page with the output of each of its blocks; all share their variables, as the cells of a notebook."""
    names: dict[str, object] = {"__name__": "__page__"}

    def run(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block["code"], "<page>", "exec"), names)
        output = printed.getvalue()
        return f"```python\n{block['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return BLOCK.sub(run, page)


def shape(page: str) -> str:
    """Return the page with a mark in the place of each number that a block printed."""
    return BLOCK.sub(lambda block: block[0].replace(block["output"] or "\0", _masked(block["output"] or "")), page)


def _masked(output: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?", "#", output)


if __name__ == "__main__":
    main()
