"""A finished run and its exported files -> a page that travels with the files and says what they are."""

import re
from collections.abc import Iterator, Sequence

from qimera.config.run_settings import RunSettings
from qimera.report.content import Export, Measured
from qimera.report.summary import Summary, readable_bytes

FILE_NAME = "MODEL_CARD.md"


def model_card(summary: Summary, settings: RunSettings, measured: Measured | None, exports: Sequence[Export]) -> str:
    """Return the page in Markdown.

    Args:
        summary: Of the run.
        settings: Of the run.
        measured: What `qimera evaluate` measured; None if it has not run.
        exports: Files that were written, as they were verified.
    """
    return "\n".join(_lines(summary, settings, measured, exports)) + "\n"


def belongs_to(text: str, summary: Summary) -> bool:
    """Return whether ``text`` is a card of the same student."""
    return text.startswith(_marker(summary))


def _marker(summary: Summary) -> str:
    return f"<!-- qimera: teacher {summary.teacher_hash[:16]}, finished {summary.finished} -->\n"


def _lines(
    summary: Summary, settings: RunSettings, measured: Measured | None, exports: Sequence[Export]
) -> Iterator[str]:
    yield _marker(summary)
    yield f"# {_plain(summary.model)} at {summary.bits}\n"
    yield (
        f"An image classifier of {summary.num_classes} classes, quantized from a model in full precision by "
        f"[Qimera](https://arxiv.org/abs/2111.02625) (qimera {summary.versions.get('qimera', '')}, "
        f"{summary.finished.partition('T')[0]}).\n"
    )
    yield "## What it is\n"
    for name, fact in _facts(summary, settings).items():
        yield f"- {name}: {fact}"
    yield "\n## What it was made from\n"
    yield _made_from(summary, settings)
    yield "\n## Accuracy\n"
    yield _accuracy(summary, measured)
    if summary.warnings:
        yield "\nWarnings of the run:\n"
        yield from (f"- {warning}." for warning in summary.warnings)
    yield "\n## Files\n"
    yield from _files(summary, exports)
    yield "\n## Intended use and limits\n"
    yield from (f"- {each}" for each in _limits(measured))


def _facts(summary: Summary, settings: RunSettings) -> dict[str, str]:
    spec = settings.input
    exceptions = f", except `{_plain(summary.layer_bits)}`" if summary.layer_bits else ""
    shape = " x ".join(map(str, spec.shape))
    return {
        "Full-precision model": f"{_plain(summary.model)}, hash of graph and weights `{summary.teacher_hash}`",
        "Bits": f"{summary.bits} (weights and activations){summary.ends_text}{exceptions}",
        "Scheme": f"{summary.scheme}, for {summary.target}",
        "Recipe": f"{summary.recipe}, seed {summary.seed}, {summary.num_steps:,} training steps",
        "Size": f"{readable_bytes(summary.student_bytes)} instead of {readable_bytes(summary.teacher_bytes)}",
        "Input": f"images of {shape} (channels, height, width), pixels from {spec.pixel_range[0]:g} to "
        f"{spec.pixel_range[1]:g}, mean {_listed(spec.mean)}, std {_listed(spec.std)}",
        "Output": f"{summary.num_classes} logits, in the order of the full-precision model's classes",
    }


def _made_from(summary: Summary, settings: RunSettings) -> str:
    bank = f" (hash of the bank `{summary.bank_hash}`)" if summary.bank_hash else ""
    samples = f"{summary.num_samples:,} samples that were synthesised from it{bank}"
    if not summary.num_images:
        return f"Only the full-precision model, and {samples}. No images and no labels were used."
    hash_of = f" (SHA-256 of their pixels `{settings.images.sha256}`)" if settings.images else ""
    beside = f", {samples}" if summary.num_samples else ""
    given = f"{summary.counted_images}{hash_of}"
    return f"The full-precision model{beside} and {given}. It was not made without data; no labels were used."


def _accuracy(summary: Summary, measured: Measured | None) -> str:
    if measured is not None and measured.warnings:
        return f"Unknown. The measurement says nothing: {measured.warnings[0]}."
    if measured is not None:
        interval = "" if measured.drop_low is None else f" ({measured.drop_low:.2f} to {measured.drop_high:.2f}, 90 %)"
        return (
            f"Measured on {measured.num_images:,} labelled images (`{_plain(measured.data)}`): top-1 "
            f"{measured.student_top1:.2f} %, in full precision {measured.teacher_top1:.2f} %, a drop of "
            f"{measured.drop:.2f} points{interval}. On {measured.agreement:.1f} % of the images both give the same "
            "class, right or wrong."
        )
    if summary.estimate is not None:
        caution = f" Here, {summary.caution}." if summary.caution else ""
        return (
            f"Not measured. Estimated without real images: {summary.estimate.text()}.{caution} An estimate is no "
            "measurement; measure the model before you rely on it."
        )
    reason = "a warning below doubts the samples" if summary.is_warned_of else "no samples were held out"
    return f"Unknown: it was not measured, and there is no estimate, because {reason}. Measure the model first."


def _files(summary: Summary, exports: Sequence[Export]) -> Iterator[str]:
    """Yield a table of the files and of the runtimes that were seen to run them, and the files that were not run."""
    compared = [export for export in exports if not export.not_run]
    if compared:
        kind = "samples" if summary.num_samples or summary.num_held_out else "images of noise"
        yield "Each file was compared with the trained student on the runtimes that the table names.\n"
        yield f"| file | size | runtime | {kind} | same class as the student | layers in integers |"
        yield "|---|---|---|---|---|---|"
    for export in compared:
        for each in export.comparisons:
            layers = f"{each['integer_layers']} of {export.num_layers}"
            yield (
                f"| `{_plain(export.file)}` | {readable_bytes(export.num_bytes)} | {each['runtime']} "
                f"| {export.num_samples} | {each['agreement']:.2f} % | {layers} |"
            )
    not_run = [export for export in exports if export.not_run]
    if not_run:
        yield "\nFiles that were not run:\n"
        for export in not_run:
            yield f"- `{_plain(export.file)}`, {readable_bytes(export.num_bytes)}: {export.not_run}."
    refusals = [refusal for export in exports for refusal in export.refusals]
    if refusals:
        yield "\nRuntimes that cannot run a file:\n"
        yield from (f"- {refusal}" for refusal in refusals)


def _limits(measured: Measured | None) -> Iterator[str]:
    yield "It is for what the full-precision model is for, on images of the same kind, and under its licence."
    yield "It inherits the errors and biases of that model. Single answers differ; some classes lose more than others."
    if measured is None:
        yield "Nobody has seen its answers to real images yet. Compare both models on labelled images first."
    yield "Fairness, robustness, and images of another kind were not examined."


def _plain(text: str) -> str:
    """Return a name that a user gave so that it cannot be taken for Markdown or HTML."""
    return re.sub(r"[`|<>\[\]\s]", "_", text)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
