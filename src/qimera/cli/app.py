"""The command line: ``qimera inspect``, ``synthesize``, ``quantize``, ``evaluate``, ``export``, ``report`` and others.

torch, and all that builds on it, is imported inside the commands, so that ``qimera --help`` answers at once.
"""

import signal
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qimera import __version__
from qimera.cli.arguments import (
    Changes,
    Device,
    Images,
    KeepImages,
    MaxDrop,
    ModelOptions,
    OutputOptions,
    Recipe,
    RunOptions,
    Seed,
    Strict,
    Threads,
    spread,
)
from qimera.cli.output import INTERRUPTED, Output, speaking
from qimera.cli.reference_commands import recipes, schema
from qimera.cli.run_commands import compare, evaluate, export, report
from qimera.errors import ConfigError
from qimera.machine.allocator import reuse_freed_memory

if TYPE_CHECKING:
    import torch

    from qimera.report.summary import Summary
    from qimera.runs.directory import RunDirectory

app = typer.Typer(
    name="qimera",
    help="Quantize trained PyTorch image classifiers to low bit widths without data.",
    epilog="Exit codes: 0 done, 2 wrong usage, 3 unsupported model, 4 diverged, 5 a check failed, "
    "6 another process of the run ended, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    reuse_freed_memory()
    try:
        app()
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # until Python has ended too
        raise


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _before_any_command(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
@spread
def inspect(
    options: ModelOptions,
    *,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer.")] = False,
    threads: Threads = None,
    output: OutputOptions,
) -> None:
    """Show which parts of a model are quantized, and what samples are synthesised from."""
    with speaking(output) as out:
        from qimera.assessment.diagnostics import untrained_because
        from qimera.cli.facts import inspection
        from qimera.cli.options import capture
        from qimera.cli.tables import layer_table, teacher_facts

        teacher = capture(options, untrained=True)
        found = inspection(options.model or "", teacher, tuple(filter(None, [untrained_because(teacher)])))
        out.result(found, teacher_facts(found), layer_table(found.layers, every_layer))
        out.warn(found.warnings)
        out.hint("next: qimera quantize, with the same options and --output RUN")


@app.command("synthesize")
@spread
def make_bank(
    options: ModelOptions,
    *,
    path: Annotated[
        Path, typer.Option("--output", metavar="BANK", help="Where the bank goes: a new directory or file.")
    ],
    form: Annotated[
        Literal["bank", "npz", "imagefolder", "safetensors"],
        typer.Option(
            "--format", metavar="NAME", help="bank for qimera; npz, imagefolder or safetensors for other tools."
        ),
    ] = "bank",
    bank: Annotated[
        Path | None, typer.Option(metavar="BANK", help="Convert a bank that was made earlier to another --format.")
    ] = None,
    recipe: Recipe = None,
    changes: Changes = None,
    images: Images = None,
    keep_images: KeepImages = None,
    seed: Seed = None,
    strict: Strict = False,
    device: Device = None,
    threads: Threads = None,
    output: OutputOptions,
) -> None:
    """Make a bank of synthetic samples: once per model, for every bit width."""
    unfinished = path.parent / f"{path.name}.unfinished"
    with speaking(output, f"the same command continues with what is in {unfinished}") as out:
        from qimera.assessment.diagnostics import diagnose, untrained_because
        from qimera.cli.facts import synthesis
        from qimera.cli.options import capture, images_and_bank, settings_of_bank
        from qimera.cli.tables import bank_facts
        from qimera.machine.acceleration import find_device
        from qimera.machine.checkpoint import Checkpoints
        from qimera.machine.distributed import is_main, joined
        from qimera.machine.files import make_folder
        from qimera.pipeline import synthesize
        from qimera.runs.limits import Limits, Result
        from qimera.synthesis.formats import write_bank

        given = {"--recipe": recipe, "--set": changes, "--seed": seed, "--device": device}
        unused = [name for name, value in given.items() if value not in (None, [])]
        if bank is not None and unused:
            raise ConfigError(f"--bank: its samples are made already, so leave out {', '.join(unused)}")
        place = find_device(device or "auto")
        if path.exists():
            raise ConfigError(f"{path}: exists already; choose another --output, or pass it to quantize as --bank")
        teacher = capture(options)
        out.warn(filter(None, [untrained_because(teacher)]))
        chosen = settings_of_bank(teacher, recipe, changes)
        pixels, made = images_and_bank(teacher, images, bank, keep_images)
        if made is None:
            if any(unfinished.glob("*")):
                out.note(f"{path}: continues with what is in {unfinished}")
            # A place that cannot be written to is refused before the work.
            make_folder(unfinished)
        with joined(), out.progress(is_main()) as progress:
            if made is None:
                made = synthesize(
                    teacher,
                    settings=chosen,
                    images=pixels,
                    keep_images=bool(keep_images),
                    seed=seed or 0,
                    device=place,
                    checkpoints=unfinished,
                    progress=progress,
                )
            if is_main():
                write_bank(made, path, form)
                Checkpoints(unfinished).forget()
                found = synthesis(path, form, options.model or "", made, diagnose(made, teacher).warnings)
                out.result(found, bank_facts(found))
                out.warn(found.warnings)
                if form == "bank":
                    out.hint(f"next: qimera quantize, with the same options and --bank {quote(str(path))} --output RUN")
                Limits(strict).check(Result(str(path), found.warnings))


@app.command()
@spread
def quantize(
    path: Annotated[
        Path, typer.Option("--output", metavar="RUN", help="Run directory: a new one, or one to continue.")
    ],
    model_options: ModelOptions,
    options: RunOptions,
    *,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start the same run again from its settings.json, instead of MODEL."),
    ] = None,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    device: Device = None,
    threads: Threads = None,
    output: OutputOptions,
) -> None:
    """Quantize a model without data; the result is a run directory, or one for each of several bits."""
    with speaking(output, f"the same command continues with what is in {path}") as out:
        from qimera.cli.results import FinishedRun, Quantization
        from qimera.machine.acceleration import find_device
        from qimera.machine.distributed import is_main, joined
        from qimera.runs.limits import Limits, Result

        place = find_device(device or "auto")
        with joined():
            done: list[FinishedRun] = []
            for each, run_options in _one_by_one(path, options):
                run, summary = _quantize(each, model_options, run_options, settings, place, out)
                done.append(FinishedRun(run=str(each), report=str(run.report_page_file), summary=summary))
                if is_main():
                    out.result(Quantization(runs=tuple(done)), summary.text(), warnings=summary.warnings)
                    out.hint(f"report: {run.report_page_file}\nnext: qimera export {quote(str(each))}")
            if is_main():
                found = (Result(each.run, each.summary.warnings, each.summary.estimated_drop) for each in done)
                Limits(strict, max_drop).check(*found)


def _one_by_one(output: Path, options: RunOptions) -> list[tuple[Path, RunOptions]]:
    """Return where each of ``--bits W8A8,W4A4`` goes; the first of several makes the bank of all."""
    from qimera.config.bits import parse_bits

    widths = [each.strip() for each in (options.bits or "").split(",")]
    if len(widths) == 1:
        return [(output, options)]
    if len(set(widths)) < len(widths) or "" in widths:
        raise ConfigError(f"--bits: expected each once, with commas between, such as w8a8,w4a4, given {options.bits}")
    for each in widths:
        parse_bits(each)
    bank = options.bank or output / widths[0] / "bank"
    banks = [options.bank, *[bank] * (len(widths) - 1)]
    keep = [options.keep_images, *[None] * (len(widths) - 1)]  # the first one's bank does
    return [
        (output / bits, replace(options, bits=bits, bank=bank, keep_images=kept))
        for bits, bank, kept in zip(widths, banks, keep, strict=True)
    ]


def _quantize(
    path: Path,
    model_options: ModelOptions,
    options: RunOptions,
    settings: Path | None,
    place: "torch.device",
    out: Output,
) -> "tuple[RunDirectory, Summary]":
    """Make or continue one run in the directory ``path``."""
    from qimera.assessment.diagnostics import untrained_because
    from qimera.cli.options import read_settings, resolve
    from qimera.machine.distributed import from_main, is_main
    from qimera.runs.directory import RunDirectory, refuse_other_content
    from qimera.runs.execution import carry_out, check_run

    from_main(refuse_other_content, path)
    read = resolve(model_options, options) if settings is None else read_settings(settings, model_options, options)
    check_run(read.settings, read.teacher, read.bank)
    run = from_main(RunDirectory.start, path, read.settings, read.teacher.hash)
    if is_main() and run.is_finished:
        out.note(f"{path}: finished already, this is its summary")
    elif is_main():
        if done := run.so_far():
            out.note(f"{path}: continues where it was interrupted; {done}")
        out.warn(filter(None, [untrained_because(read.teacher)]))
    with out.progress(is_main()) as progress:
        summary = carry_out(run, read.teacher, read.bank, progress, place, read.images)
    if is_main() and not run.report_page_file.exists():
        from qimera.runs.reporting import report_run  # brings Matplotlib, which a finished run needs no more

        out.note("writing the report")
        report_run(run)
    return run, summary


for command in (evaluate, report, compare, export, recipes):
    app.command()(spread(command))
app.command()(schema)
