"""The commands on finished runs: ``qimera evaluate``, ``report``, ``compare`` and ``export``."""

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from qimera.cli import completion
from qimera.cli.arguments import Device, MaxDrop, OutputOptions, Run, Strict, Threads
from qimera.cli.console import terminal_width
from qimera.cli.output import speaking


def evaluate(
    run: Run,
    data: Annotated[
        Path,
        typer.Option(metavar="PATH", help=".npz with uint8 images (NHWC) and labels, or a folder for each class."),
    ],
    *,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    device: Device = None,
    threads: Threads = None,
    output: OutputOptions,
) -> None:
    """Measure the accuracy of a run's student and of its teacher on labelled images."""
    with speaking(output) as out:
        from qimera.assessment.data import load_labelled_images
        from qimera.cli.results import Measurement
        from qimera.cli.tables import evaluation_table
        from qimera.machine.acceleration import find_device
        from qimera.runs.directory import RunDirectory
        from qimera.runs.execution import evaluate_run
        from qimera.runs.limits import Limits, Result
        from qimera.runs.reporting import keep_evaluation

        place = find_device(device or "auto")
        directory = RunDirectory.open(run)
        images = load_labelled_images(data, directory.settings.input, directory.summary().num_classes)
        with out.progress() as progress:
            result = evaluate_run(directory, images, progress, place)
        measured = Measurement.of(run, data, result)
        out.result(measured, evaluation_table(result))
        out.warn(result.warnings)
        keep_evaluation(directory, data, images, result)
        out.hint(f"report: {directory.report_page_file}")
        drop = None if result.warnings else measured.drop
        Limits(strict, max_drop).check(Result(str(run), result.warnings, drop, "measured"))


def report(run: Run, *, threads: Threads = None, output: OutputOptions) -> None:
    """Write the report of a run again: report.html and report.json."""
    with speaking(output) as out:
        from qimera.cli.results import WrittenReport
        from qimera.runs.directory import RunDirectory
        from qimera.runs.reporting import report_run

        directory = RunDirectory.open(run)
        warnings = report_run(directory).warnings
        out.warn(warnings)
        page, data = str(directory.report_page_file), str(directory.report_data_file)
        out.result(WrittenReport(run=str(run), report=page, data=data, warnings=warnings), f"{page}\n")


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS",
            help="Run directories, each the --output of `qimera quantize`.",
            autocompletion=completion.runs,
        ),
    ],
    *,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    output: OutputOptions,
) -> None:
    """Show runs side by side, the best first: bits, size, accuracy and time."""
    with speaking(output) as out:
        from qimera.cli.results import ComparedRuns
        from qimera.runs.comparison import compared, comparison_table, result_of, warning_lines
        from qimera.runs.directory import RunDirectory
        from qimera.runs.limits import Limits

        directories = [RunDirectory.open(run) for run in runs]
        found = ComparedRuns(runs=tuple(map(compared, directories)))
        width = terminal_width()
        warnings = (f"{each.run}: {warning}" for each in found.runs for warning in each.warnings)
        out.result(found, comparison_table(directories, width), warning_lines(directories, width), warnings=warnings)
        Limits(strict, max_drop).check(*map(result_of, directories))


def export(
    run: Run,
    *,
    form: Annotated[
        Literal["onnx", "pt2", "aotinductor", "executorch", "litert", "tflm", "coreml"],
        typer.Option(
            "--format",
            metavar="NAME",
            help="onnx, pt2 (torch.export program), aotinductor (compiled package), executorch or litert (for phones), "
            "tflm (for microcontrollers) or coreml (experimental).",
        ),
    ] = "onnx",
    file: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Where the file goes. Default: student.* in RUN."),
    ] = None,
    include_preprocessing: Annotated[
        bool,
        typer.Option(
            "--include-preprocessing",
            help="onnx, litert, tflm: make the file take uint8 NHWC pixels and normalise them itself.",
        ),
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="onnx, litert: names of the classes, one per line, for the file's metadata."),
    ] = None,
    integer_logits: Annotated[
        bool,
        typer.Option("--integer-logits", help="litert, tflm: return int8 logits, their range taken from the samples."),
    ] = False,
    min_agreement: Annotated[
        float,
        typer.Option(
            metavar="PERCENT",
            min=0,
            max=100,
            help="Percent of samples on which file and student must give the same class.",
        ),
    ] = 99.0,
    threads: Threads = None,
    output: OutputOptions,
) -> None:
    """Write the student of a run as a file for other runtimes, and compare the file with the student."""
    with speaking(output, "the file is complete, or not there") as out:
        from qimera.cli.results import ExportedFile
        from qimera.runs.directory import RunDirectory
        from qimera.runs.exporting import FILE_NAMES, export_run
        from qimera.runs.model_card import card_beside
        from qimera.runs.reporting import report_run

        directory = RunDirectory.open(run)
        path = file or directory.path / FILE_NAMES[form]
        verification = export_run(
            directory,
            path,
            form,
            include_preprocessing=include_preprocessing,
            labels_file=labels,
            integer_logits=integer_logits,
            min_agreement=min_agreement,
        )
        if directory.report_page_file.exists():
            report_run(directory)
        card = card_beside(directory, path)
        found = ExportedFile(run=str(run), file=str(path), model_card=str(card), format=form, **asdict(verification))
        out.result(found, f"{path}: {verification.text()}")
        out.hint(f"model card: {card}")
        if not (directory.evaluation_file).exists():
            out.hint(f"next: qimera evaluate {quote(str(run))} --data PATH, if you have labelled images")
