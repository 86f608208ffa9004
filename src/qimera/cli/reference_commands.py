"""The commands that look things up: ``qimera recipes`` and ``qimera schema``."""

import json
from typing import Annotated, Literal

import typer

from qimera.cli.arguments import OutputOptions
from qimera.cli.output import speaking


def recipes(
    *,
    input_shape: Annotated[
        str, typer.Option(metavar="C,H,W", help="Channels, height and width of an image.")
    ] = "3,32,32",
    num_classes: Annotated[int, typer.Option(metavar="N", min=2, help="Number of classes of the model.")] = 10,
    output: OutputOptions,
) -> None:
    """List the recipes, what they do and what they cost."""
    with speaking(output) as out:
        from qimera.cli.facts import recipes_of
        from qimera.cli.options import naming_options, shape_of
        from qimera.cli.tables import recipe_facts, recipe_table

        shape = shape_of(input_shape)
        with naming_options():
            found = recipes_of(shape, num_classes)
        out.result(found, recipe_facts(found), recipe_table(found))


def schema(
    name: Annotated[
        Literal["summary", "inspect", "synthesize", "quantize", "evaluate", "report", "compare", "export", "recipes"],
        typer.Argument(metavar="NAME", help="summary, or a command that takes --json."),
    ] = "summary",
) -> None:
    """Print the JSON schema of summary.json, or of what a command prints with --json."""
    from qimera.cli.schemas import schema_of

    typer.echo(json.dumps(schema_of(name), indent=2))
