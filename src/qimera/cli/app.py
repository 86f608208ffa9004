"""The command line: ``qimera inspect``, ``synthesize``, ``quantize``, ``evaluate``, ``export``, ``report`` and others.

torch, and all that builds on it, is imported inside the commands, so that ``qimera --help`` answers at once.
"""

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qimera import __version__
from qimera.cli.arguments import (
    Debug,
    Device,
    MaxDrop,
    ModelOptions,
    Recipe,
    RunOptions,
    Seed,
    Strict,
    Threads,
    spread,
)
from qimera.cli.console import INTERRUPTED, ProgressDisplay, errors_as_messages, print_table, warn
from qimera.cli.run_commands import compare, evaluate, export, report
from qimera.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from qimera.runs.limits import Result

app = typer.Typer(
    name="qimera",
    help="Quantize trained PyTorch image classifiers to low bit widths without data.",
    epilog="Exit codes: 0 done, 2 wrong usage, 3 unsupported model, 4 diverged, 5 a check failed, "
    "6 another process of the run ended, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
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
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer.")] = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Show what of a model is quantized, and what samples are synthesised from."""
    with errors_as_messages(debug):
        from qimera.assessment.diagnostics import untrained_because
        from qimera.cli.options import capture
        from qimera.cli.tables import layer_table, teacher_facts

        teacher = capture(options, untrained=True)
        typer.echo(teacher_facts(options.model or "", teacher), nl=False)
        print_table(layer_table(teacher, every_layer))
        warn(filter(None, [untrained_because(teacher)]))
        typer.echo("next: qimera quantize, with the same options and --output RUN", err=True)


@app.command("synthesize")
@spread
def make_bank(
    options: ModelOptions,
    output: Annotated[Path, typer.Option(metavar="BANK", help="Directory that becomes the bank, or the file.")],
    form: Annotated[
        Literal["bank", "npz", "imagefolder", "safetensors"],
        typer.Option("--format", help="For qimera, or for other tools."),
    ] = "bank",
    bank: Annotated[Path | None, typer.Option(metavar="BANK", help="Write one that was made earlier.")] = None,
    recipe: Recipe = None,
    seed: Seed = None,
    strict: Strict = False,
    device: Device = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Make a bank of synthetic samples: once per model, for every bit width."""
    unfinished = output.with_name(f"{output.name}.unfinished")
    with errors_as_messages(debug, f"the same command continues with what is in {unfinished}"):
        from qimera.assessment.diagnostics import diagnose, untrained_because
        from qimera.cli.options import capture, recipe_of_bank
        from qimera.cli.tables import bank_facts
        from qimera.machine.acceleration import find_device
        from qimera.machine.checkpoint import Checkpoints
        from qimera.machine.distributed import is_main, joined
        from qimera.pipeline import synthesize
        from qimera.runs.limits import Limits, Result
        from qimera.synthesis.bank import SampleBank
        from qimera.synthesis.formats import write_bank

        given = {"--recipe": recipe, "--seed": seed, "--device": device}
        unused = [name for name, value in given.items() if value is not None]
        if bank is not None and unused:
            raise ConfigError(f"--bank: its samples are made already, so leave out {', '.join(unused)}")
        place = find_device(device or "auto")
        if output.exists():
            raise ConfigError(f"{output}: exists already; choose another --output, or pass it to quantize as --bank")
        teacher = capture(options)
        warn(filter(None, [untrained_because(teacher)]))
        chosen = recipe_of_bank(teacher, recipe).synthesis
        made = None if bank is None else SampleBank.load(bank, teacher)
        if made is None:
            if any(unfinished.glob("*")):
                typer.echo(f"{output}: continues with what is in {unfinished}", err=True)
            # A place that cannot be written to is refused before the work.
            unfinished.mkdir(parents=True, exist_ok=True)
        with joined(), ProgressDisplay(is_main()) as progress:
            if made is None:
                made = synthesize(
                    teacher, None, chosen, seed=seed or 0, device=place, checkpoints=unfinished, progress=progress
                )
            if is_main():
                write_bank(made, output, form)
                Checkpoints(unfinished).forget()
                typer.echo(bank_facts(output, options.model or "", made, teacher))
                found = diagnose(made, teacher).warnings
                warn(found)
                if form == "bank":
                    typer.echo(
                        f"next: qimera quantize, with the same options and --bank {output} --output RUN", err=True
                    )
                Limits(strict).check(Result(str(output), found))


@app.command()
@spread
def quantize(
    output: Annotated[Path, typer.Option(metavar="RUN", help="Directory of the run; made, or continued.")],
    model_options: ModelOptions,
    options: RunOptions,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="settings.json of a run: starts the same again, instead of MODEL."),
    ] = None,
    strict: Strict = False,
    max_drop: MaxDrop = None,
    device: Device = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Quantize a model without data; the result is a run directory, or one for each of several bits."""
    with errors_as_messages(debug, f"the same command continues with what is in {output}"):
        from qimera.machine.acceleration import find_device
        from qimera.machine.distributed import is_main, joined
        from qimera.runs.limits import Limits

        place = find_device(device or "auto")
        with joined():
            runs = _one_by_one(output, options)
            results = [_quantize(path, model_options, each, settings, place) for path, each in runs]
            if is_main():
                Limits(strict, max_drop).check(*results)


def _one_by_one(output: Path, options: RunOptions) -> list[tuple[Path, RunOptions]]:
    """Return where each of ``--bits W8A8,W4A4`` goes; the first of several makes the bank of all."""
    widths = [each.strip() for each in (options.bits or "").split(",")]
    if len(widths) == 1:
        return [(output, options)]
    if len(set(widths)) < len(widths) or "" in widths:
        raise ConfigError(f"--bits: expected each once, with commas between, such as w8a8,w4a4, given {options.bits}")
    bank = options.bank or output / widths[0] / "bank"
    banks = [options.bank, *[bank] * (len(widths) - 1)]
    return [(output / bits, replace(options, bits=bits, bank=bank)) for bits, bank in zip(widths, banks, strict=True)]


def _quantize(
    output: Path, model_options: ModelOptions, options: RunOptions, settings: Path | None, place: "torch.device"
) -> "Result":
    """Make or continue one run, and return what it came to."""
    from qimera.assessment.diagnostics import untrained_because
    from qimera.cli.options import read_settings, resolve
    from qimera.machine.distributed import from_main, is_main
    from qimera.runs.directory import RunDirectory, refuse_other_content
    from qimera.runs.execution import carry_out, check_run
    from qimera.runs.limits import Result
    from qimera.runs.reporting import report_run

    from_main(refuse_other_content, output)
    read = resolve(model_options, options) if settings is None else read_settings(settings, model_options, options)
    check_run(read.settings, read.teacher, read.bank)
    run = from_main(RunDirectory.start, output, read.settings)
    if is_main() and run.is_finished:
        typer.echo(f"{output}: finished already, this is its summary", err=True)
    elif is_main():
        if done := run.so_far():
            typer.echo(f"{output}: continues where it was interrupted; {done}", err=True)
        warn(filter(None, [untrained_because(read.teacher)]))
    with ProgressDisplay(is_main()) as progress:
        summary = carry_out(run, read.teacher, read.bank, progress, place)
    if is_main():
        if not run.report_page_file.exists():
            typer.echo("writing the report", err=True)
            report_run(run)
        typer.echo(summary.text(), nl=False)
        typer.echo(f"report: {run.report_page_file}\nnext: qimera export {output}", err=True)
    return Result(str(output), summary.warnings, summary.estimated_drop)


for command in (evaluate, report, compare, export):
    app.command()(command)


@app.command()
def recipes(
    input_shape: Annotated[str, typer.Option(metavar="C,H,W", help="One image.")] = "3,32,32",
    num_classes: Annotated[int, typer.Option(min=2, help="Classes of the model.")] = 10,
    debug: Debug = False,
) -> None:
    """List the recipes and what they cost."""
    with errors_as_messages(debug):
        from qimera.cli.options import shape_of
        from qimera.cli.tables import recipe_table

        print_table(recipe_table(shape_of(input_shape), num_classes))
