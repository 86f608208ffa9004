"""The commands on finished runs: ``qimera evaluate``, ``report``, ``compare`` and ``export``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qimera.cli.arguments import Debug, Device, MaxDrop, Strict, Threads
from qimera.cli.console import ProgressDisplay, errors_as_messages, print_table, terminal_width, warn


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --output of qimera quantize.")],
    data: Annotated[
        Path, typer.Option(metavar="PATH", help=".npz with uint8 images (NHWC) and labels, or a folder per class.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    device: Device = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Compare the student of a run with its teacher on labelled images."""
    with errors_as_messages(debug):
        from qimera.assessment.data import load_labelled_images
        from qimera.cli.tables import evaluation_table, evaluation_values
        from qimera.machine.acceleration import find_device
        from qimera.runs.directory import RunDirectory
        from qimera.runs.execution import evaluate_run
        from qimera.runs.limits import Limits, Result
        from qimera.runs.reporting import keep_evaluation

        place = find_device(device or "auto")
        directory = RunDirectory.open(run)
        images = load_labelled_images(data, directory.settings.input, directory.summary().num_classes)
        with ProgressDisplay() as progress:
            result = evaluate_run(directory, images, progress, place)
        if as_json:
            typer.echo(json.dumps(evaluation_values(run, data, result), indent=2))
        else:
            print_table(evaluation_table(result))
        warn(result.warnings)
        keep_evaluation(directory, data, images, result)
        drop = None if result.warnings or result.teacher_top1 is None else result.teacher_top1 - result.top1
        Limits(strict, max_drop).check(Result(str(run), result.warnings, drop, "measured"))


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --output of qimera quantize.")],
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Write the report of a run anew: report.html and report.json."""
    with errors_as_messages(debug):
        from qimera.runs.directory import RunDirectory
        from qimera.runs.reporting import report_run

        directory = RunDirectory.open(run)
        warn(report_run(directory).warnings)
        typer.echo(directory.report_page_file)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Each the --output of qimera quantize.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    debug: Debug = False,
) -> None:
    """Put runs side by side: bits, size, accuracy and time."""
    with errors_as_messages(debug):
        from qimera.runs.comparison import comparison_table, comparison_values, result_of
        from qimera.runs.directory import RunDirectory
        from qimera.runs.limits import Limits

        directories = [RunDirectory.open(run) for run in runs]
        if as_json:
            typer.echo(json.dumps(comparison_values(directories), indent=2))
        else:
            print_table(comparison_table(directories, terminal_width()))
        Limits(strict, max_drop).check(*map(result_of, directories))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --output of qimera quantize.")],
    form: Annotated[
        Literal["onnx", "pt2", "aotinductor", "executorch"],
        typer.Option("--format", help="ONNX, torch.export program, AOTInductor package, or ExecuTorch for XNNPACK."),
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the file goes. Default: in RUN, called student.*.")
    ] = None,
    include_preprocessing: Annotated[
        bool, typer.Option("--include-preprocessing", help="Let the file read uint8 NHWC pixels and normalise them.")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, one a line, for the metadata.")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of samples that must get the student's class.")
    ] = 99.0,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Write the student of a run as a file for other runtimes, and compare the file with it."""
    with errors_as_messages(debug, "no file was written"):
        from qimera.runs.directory import RunDirectory
        from qimera.runs.exporting import FILE_NAMES, export_run
        from qimera.runs.reporting import report_run

        directory = RunDirectory.open(run)
        path = output or directory.path / FILE_NAMES[form]
        verification = export_run(
            directory,
            path,
            form,
            include_preprocessing=include_preprocessing,
            labels_file=labels,
            min_agreement=min_agreement,
        )
        if directory.report_page_file.exists():
            report_run(directory)
        typer.echo(f"{path}: {verification.text()}", nl=False)
