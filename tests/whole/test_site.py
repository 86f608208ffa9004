"""The documentation site, built as `make docs` builds it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

import qimera
from qimera.config.base import Settings
from scripts import run_page

ROOT = Path(__file__).parents[2]

needs_mkdocs = pytest.mark.skipif(
    any(find_spec(each) is None for each in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="needs the extra `docs`; `make test` installs it",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def references(site: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield each page of the site with the element and the address of everything that it loads or links to."""
    for page in site.rglob("*.html"):
        for element, address in re.findall(r'<(\w+)[^>]*? (?:href|src)="?([^" >]+)', page.read_text()):
            yield page, element, unescape(address)


@needs_mkdocs
def test_the_api_page_has_every_public_name_and_every_setting(site: Path) -> None:
    anchors = set(re.findall(r'id="(qimera\.[\w.]+)"', (site / "api.html").read_text()))
    classes = [each for each in (getattr(qimera, name) for name in qimera.__all__) if isinstance(each, type)]
    settings = [each for each in classes if issubclass(each, Settings)]
    assert len(settings) > 6
    fields = {f"{each.__name__}.{field}" for each in settings for field in each.model_fields}
    assert {f"qimera.{name}" for name in {*qimera.__all__, *fields}} <= anchors


@needs_mkdocs
def test_the_api_page_shows_shapes_and_limits(site: Path) -> None:
    text = unescape(re.sub(r"<[^>]+>", "", (site / "api.html").read_text()))
    assert re.search(r"images: Float\[Tensor, ['\"]batch channel height width['\"]\]", text)
    assert "superposition_probability: float = Field(0.4, ge=0, le=1)" in text


@needs_mkdocs
def test_the_index_is_the_readme(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert all(f'id="{each}"' in index for each in ("quick-start", "which-recipe", "accuracy"))
    assert 'href="tutorial.html"' in index
    assert 'src="boundary-samples.png"' in index


@needs_mkdocs
def test_every_page_of_docs_is_in_the_navigation(site: Path) -> None:
    index = (site / "index.html").read_text()
    tabs = re.findall(r'class="md-tabs__link">\s*(.*?)\s*</a>', index, re.DOTALL)
    assert tabs == ["Get started", "Guides", "Method", "Reference", "Evidence"]
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in index, page.name


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = [address for _, element, address in references(site) if element in ("link", "script", "img", "iframe")]
    assert len(loaded) > 50
    assert [each for each in loaded if re.match(r"(https?:)?//", each)] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//", styles)


@needs_mkdocs
def test_every_link_of_the_site_leads_to_a_file(site: Path) -> None:
    inner = [each for each in references(site) if not re.match(r"#|\w+:|/", each[2])]
    assert len(inner) > 500
    for page, _, address in inner:
        target = page.parent / unquote(address.partition("#")[0])
        assert target.exists(), f"{page.name}: {address}"


# --- pages that are run -----------------------------------------------------------------------------------------------


def test_a_page_gets_what_its_blocks_print_and_blocks_share_variables() -> None:
    page = "one\n\n```python\nx = 2\n```\n\ntwo\n\n```python\nprint(x * 3)\n```\n"
    expected = page + "\n```text\n6\n```\n"
    assert run_page.executed(page) == expected
    assert run_page.executed(page + "\n```text\nstale\n```\n") == expected


def test_numbers_that_a_block_prints_may_differ_and_words_and_code_may_not() -> None:
    page = "```python\nprint(1)\n```\n\n```text\ndrop: 1.5 %\n```\n"
    assert run_page.shape(page) == run_page.shape(page.replace("1.5", "-22.25"))
    assert run_page.shape(page) != run_page.shape(page.replace("drop", "rise"))
    assert run_page.shape(page) != run_page.shape(page.replace("print(1)", "print(2)"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_of_the_ablation_says_what_its_blocks_print() -> None:
    command = [sys.executable, "-m", "scripts.run_page", "docs/ablation.md", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
