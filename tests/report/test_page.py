"""A report of a run whose bank is good: what it holds, and what its page says."""

import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qimera.config.settings import DirectSettings, SynthesisSettings
from qimera.report.boundary import nearest_three
from qimera.report.content import Export, Measured, Report
from qimera.report.page import write_page
from qimera.report.plane import view_of
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import load_bank, load_student
from qimera.runs.reporting import collect
from qimera.teacher.sources import EMBEDDED_MODELS
from tests.command_line import qimera, said, tiny_settings
from tests.spared import drawn_figures

BAD_SYNTHESIS = SynthesisSettings(num_optimized=48, num_held_out=16, direct=DirectSettings(num_steps=10, batch_size=32))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits_bank: Path) -> RunDirectory:
    """A finished run with its report."""
    folder = tmp_path_factory.mktemp("run")
    spec = EMBEDDED_MODELS["mnist_cnn"].input_spec
    tiny_settings("mnist_cnn", input=spec, bank=str(digits_bank)).save(folder / "settings.json")
    with drawn_figures():
        done = qimera("quantize", "--settings", folder / "settings.json", "--output", folder / "run")
    assert done.exit_code == 0, done.stderr
    assert f"report: {folder / 'run' / 'report.html'}" in done.stderr
    return RunDirectory.open(folder / "run")


@pytest.fixture(scope="module")
def page(run: RunDirectory) -> str:
    return run.report_page_file.read_text()


def test_the_report_comes_back_from_its_file(run: RunDirectory) -> None:
    student, teacher = load_student(run)
    found = Report.load(run.report_data_file)
    assert found == collect(run, student, teacher, load_bank(run, teacher))
    assert found.summary == run.summary()
    assert found.measured is None
    first, *others = (layer.macs for layer in teacher.layers)
    assert found.multiply_adds == first + sum(others)
    assert found.bit_operations == 4 * 8 * first + 4 * 4 * sum(others)  # the first layer reads pixels of 8 bits


def test_curves_are_the_recorded_steps(run: RunDirectory) -> None:
    (found,) = [curve for curve in Report.load(run.report_data_file).curves if curve.name == "kl"]
    recorded = [line for line in run.metrics.lines() if "kl" in line]
    assert found.steps == tuple(line["step"] for line in recorded)
    assert found.values == pytest.approx([line["kl"] for line in recorded])


class Tags(HTMLParser):
    """Collects what a page asks for from elsewhere, its headings, pictures and identifiers; every tag must close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.said: list[str | None] = []
        """Of pictures and drawings, for people who do not see them."""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "xlink:href")]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.headings += [tag] * (tag in ("h1", "h2", "h3", "h4"))
        if tag in ("img", "svg"):
            self.said.append(dict(attributes).get("alt" if tag == "img" else "aria-label"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def words(page: str) -> str:
    """Return the page with single spaces, as a browser shows it."""
    return " ".join(page.split())


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    assert all(address.startswith(("data:image/png", "#")) for address in tags.addresses)
    assert len(set(tags.ids)) == len(tags.ids)
    assert "<script" not in page
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_can_be_read_without_seeing_it(page: str) -> None:
    tags = Tags(page)
    assert tags.headings == ["h1", *9 * ["h2"], "h3"]
    assert len(tags.said) == 1 + 7 + 6  # the grid, the walk, the drawings
    assert all(tags.said)
    assert page.startswith('<!doctype html>\n<html lang="en">')


def test_the_first_line_is_of_real_images_alone(page: str, run: RunDirectory) -> None:
    estimate = run.summary().estimate
    first, _, rest = words(page).partition("</dl>")
    assert "Top-1 points lost on real images, <em>estimated</em> without data" in first
    assert "same class" not in first
    assert f"comes from {estimate.num_samples} held-out synthetic samples" in rest
    assert f"puts {estimate.agreement:.1f} % into the same class" in rest
    assert "Not yet measured on real images" in rest


def test_bit_operations_are_told_as_a_ratio_above_one(page: str, run: RunDirectory) -> None:
    found = Report.load(run.report_data_file)
    ratio = 1024 * found.multiply_adds / found.bit_operations
    assert f"<b>{ratio:.0f} times fewer</b>than float32" in words(page)


def test_every_limit_of_the_bank_has_a_verdict_in_words(page: str, run: RunDirectory) -> None:
    checks = Report.load(run.report_data_file).bank.checks
    assert len(checks) == 5
    assert page.count("✓ good") == sum(check.is_good for check in checks.values())
    assert page.count("✗ check") == sum(not check.is_good for check in checks.values())
    assert all(check.limit in page for check in checks.values())


def test_the_plane_is_said_to_show_what_it_shows(page: str, run: RunDirectory) -> None:
    classes = nearest_three(load_bank(run, load_student(run)[1]))
    assert f"for classes {', '.join(map(str, classes))}: the ones that the model confuses most" in words(page)
    assert all(f">class {number}<" in page for number in classes)


def test_no_curve_is_said_to_fall(page: str) -> None:
    assert "a single curve may rise" in words(page)
    assert "should fall" not in page


def test_paper_shows_all_of_the_page(page: str) -> None:
    printed = page[page.index("@media print") : page.index("</style>")]
    assert re.search(r"figure, [^{]*tr[^{]*\{ break-inside: avoid; \}", printed)
    assert "pre { max-height: none;" in printed
    assert "<details" not in page  # a closed one stays closed on paper
    assert page.count("<figcaption>") == page.count("<figure>") == 8


def test_a_phone_scrolls_what_is_wide_and_says_so(page: str) -> None:
    assert page.count('<p class="hint">Scroll sideways') == page.count('<div class="scroll" role="region"') == 7


def rewritten(run: RunDirectory, **changes: object) -> str:
    """Return the page of a run whose report says something else."""
    _, teacher = load_student(run)
    with drawn_figures():
        bank = load_bank(run, teacher)
        view = view_of(teacher, bank.synthetic)
        return write_page(Report.load(run.report_data_file).replace(**changes), teacher, bank, view)


def test_layers_that_cost_nothing_are_not_drawn(run: RunDirectory, page: str) -> None:
    layers = Report.load(run.report_data_file).layers
    assert "Right: the divergence" in words(page)
    without = rewritten(run, layers=tuple(layer.replace(cost=0.00009) for layer in layers))
    assert "Right: the divergence" not in words(without)
    assert f"below 0.0001 nats for each of the {len(layers)} layers" in words(without)


def test_only_the_costliest_of_many_layers_are_drawn(run: RunDirectory) -> None:
    layers = Report.load(run.report_data_file).layers
    many = tuple(layers[0].replace(name=f"block{number}", cost=float(number)) for number in range(60))
    found = words(rewritten(run, layers=many))
    assert "The 40 costliest of 60 layers." in found
    assert "block59 costs most, 3 % of the sum" in found  # 59 of 1770
    assert ">block20 " in found
    assert ">block19 " not in found


def test_a_layer_that_makes_the_answers_nan_costs_most(run: RunDirectory) -> None:
    first, *others = Report.load(run.report_data_file).layers
    page = rewritten(run, layers=(*others, first.replace(cost=math.inf, error=math.nan)))
    assert f"Quantized alone, {first.name} makes the answers NaN or infinite: it needs more bits." in words(page)
    assert "nan %" not in page


def test_a_measurement_on_images_that_the_teacher_knows_is_called_one(run: RunDirectory, tmp_path: Path) -> None:
    """Samples of another seed stand for real images here, as the teacher sees them."""
    bank = load_bank(run, load_student(run)[1])
    np.savez(
        tmp_path / "test.npz", images=bank.pixels.permute(0, 2, 3, 1).numpy(), labels=bank.logits.argmax(1).numpy()
    )
    copied = shutil.copytree(run.path, tmp_path / "run")
    with drawn_figures():
        done = qimera("evaluate", copied, "--data", tmp_path / "test.npz", "--strict", "--max-drop", "100")
    assert done.exit_code == 0, done.stderr
    assert "drop in top-1, 90 % interval:" in done.stdout
    measured = (copied / "report.html").read_text()
    first, _, rest = words(measured).partition("</dl>")
    assert "Top-1 points lost, measured" in first
    assert f"on {len(bank):,} images of <code>test.npz</code>" in first
    assert f"of the same {len(bank):,} images, right or wrong" in first
    assert "estimate" not in first + rest.partition("<h2>")[0]
    assert "real (" in rest  # in the plane of features
    with drawn_figures():  # and still there when the page is written again, from numbers alone
        assert qimera("report", copied).exit_code == 0
    assert (copied / "report.html").read_text() == measured
    assert len(RunDirectory.open(copied).measured.places[0]) == 3
    values = json.loads(qimera("compare", copied, "--json").stdout)["runs"][0]
    assert qimera("compare", copied, "--max-drop", max(0, values["measured_drop"])).exit_code == 0
    assert values["warnings"] == []


def test_names_of_the_user_cannot_change_the_page(run: RunDirectory) -> None:
    found = Report.load(run.report_data_file)
    harm = '"><script>alert(1)</script>$x^{$--'
    compared = {"runtime": harm, "agreement": 100.0, "integer_layers": 1, "latency_ms": 1.0, "float_latency_ms": 2.0}
    page = rewritten(
        run,
        summary=found.summary.replace(model=harm, warnings=(f"data: {harm}",), layer_bits=harm),
        layers=tuple(layer.replace(name=f"{number}{harm}") for number, layer in enumerate(found.layers)),
        bank=found.bank.replace(statistics_gap={harm: 0.5}),
        curves=tuple(curve.replace(part=harm, name=harm) for curve in found.curves),
        exports=(Export(file=harm, num_layers=1, num_bytes=1, num_samples=1, comparisons=(compared,)),),
        measured=Measured(data=harm, num_images=1, student_top1=1, teacher_top1=1, agreement=1),
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert Tags(page).open == []


def test_a_bad_bank_is_warned_of_on_the_page_and_first_in_the_summary(tmp_path: Path, run: RunDirectory) -> None:
    nothing = tiny_settings().input.replace(mean=(0.0,), std=(1.0,))
    tiny_settings(synthesis=BAD_SYNTHESIS, input=nothing).save(tmp_path / "settings.json")
    command = ("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    done = qimera(*command)
    assert done.exit_code == 0
    assert done.stdout.startswith("warning    statistics: samples differ from the training data")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "a wrong mean, std or pixel range is the" in page
    checks = Report.load(tmp_path / "run" / "report.json").bank.checks
    assert page.count("✗ check") == sum(not check.is_good for check in checks.values()) > 0
    strict = qimera(*command, "--strict", "--max-drop", 3)
    assert strict.exit_code == 5
    assert re.search(r"--strict: \S+ has \d warnings, shown above; --max-drop: \S+ has no estimated drop", said(strict))
    both = qimera("compare", tmp_path / "run", run.path, "--json")
    assert [bool(each["warnings"]) for each in json.loads(both.stdout)["runs"]] == [True, False]
    ranked = qimera("compare", tmp_path / "run", run.path, "--strict")
    assert ranked.exit_code == 5
    lines = [line for line in ranked.stdout.splitlines() if "w4a4" in line]
    assert ["none" in line for line in lines] == [False, True]
    assert "warning: " in ranked.stdout


def test_runs_are_put_side_by_side(run: RunDirectory, tmp_path: Path) -> None:
    other = shutil.copytree(run.path, tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    summary["estimate"]["drop"] = -50.0
    (other / "summary.json").write_text(json.dumps(summary))
    lines = qimera("compare", run.path, other).stdout.splitlines()
    assert ["-50.00" in line for line in lines if "w4a4" in line] == [True, False]  # the best first
    values = json.loads(qimera("compare", run.path, other, "--json").stdout)["runs"]
    assert [each["run"] for each in values] == [str(run.path), str(other)]
    assert values[1]["estimated_drop"] == -50.0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium in the search path")
@pytest.mark.parametrize("width", [390, 800, 1200])
def test_nothing_is_wider_than_the_window(page: str, tmp_path: Path, width: int) -> None:
    """The page in a frame of a phone's or a desk's width, which tells what it measures."""
    frame = (
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{escape(page)}"></iframe><p id="p"></p>'
        "<script>f.onload=()=>{const d=f.contentDocument,r=[...d.querySelectorAll('h1,h2,p,img,.card,td')]"
        ".map(e=>e.getBoundingClientRect());p.textContent=JSON.stringify({"
        "over:d.documentElement.scrollWidth-d.documentElement.clientWidth,"
        "flat:r.filter(b=>b.width>0&&b.height<1).length,svg:[...d.querySelectorAll('svg')].filter("
        "e=>e.getBoundingClientRect().height>50).length,images:[...d.images].every(i=>i.naturalWidth>0)})}</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    options = ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    dumped = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(re.findall(r'<p id="p">(.*?)</p>', dumped)[0])
    assert found == {"over": 0, "flat": 0, "svg": 6, "images": True}
