import re
from typing import Any

import pytest

from qimera.assessment.estimation import Estimate
from qimera.config.given_images import GivenImages
from qimera.report.content import Export, Measured
from qimera.report.model_card import belongs_to, model_card
from qimera.report.summary import Summary
from tests.command_line import tiny_settings

ESTIMATE = Estimate(drop=1.26, low=0.31, high=2.2, agreement=99.0, num_samples=81)
MEASURED = Measured(
    data="test.npz",
    num_images=1000,
    student_top1=98.5,
    teacher_top1=98.9,
    agreement=99.6,
    drop_low=0.03,
    drop_high=0.77,
)
COMPARISON = {"runtime": "ONNX Runtime 1.22", "agreement": 99.61, "integer_layers": 9}
EXPORT = Export(
    file="student.onnx",
    num_layers=10,
    num_bytes=42_700,
    num_samples=256,
    comparisons=(COMPARISON,),
    refusals=("X",),
)


def summary(**changes: Any) -> Summary:
    values: dict[str, Any] = {
        "model": "resnet.py:build",
        "teacher_hash": "ab" * 32,
        "num_classes": 10,
        "bits": "w4a4",
        "scheme": "hardware",
        "layer_bits": "conv1=w8a8",
        "recipe": "ptq",
        "seed": 3,
        "num_samples": 128,
        "num_held_out": 64,
        "num_steps": 0,
        "estimate": ESTIMATE,
        "teacher_bytes": 313_700,
        "student_bytes": 42_700,
        "bank_seconds": 1.0,
        "student_seconds": 1.0,
        "finished": "2026-11-30T10:00:00+00:00",
        "machine": "x86_64",
        "versions": {"qimera": "0.2.0"},
    }
    return Summary(**{**values, **changes})


def card(measured: Measured | None = None, images: GivenImages | None = None, **changes: Any) -> str:
    """Return the card on one line."""
    found = summary(**changes, num_images=images.count if images else 0)
    return re.sub(r"\s+", " ", model_card(found, tiny_settings(images=images), measured, [EXPORT]))


def test_a_card_says_what_the_model_is_and_from_which_teacher() -> None:
    text = card()
    for fact in (
        "# resnet.py:build at w4a4",
        "An image classifier of 10 classes, quantized from a model in full precision by",
        f"hash of graph and weights `{'ab' * 32}`",
        "w4a4 (weights and activations), except `conv1=w8a8`",
        "hardware, for onnxruntime",
        "ptq, seed 3, 0 training steps",
        "42.7 kB instead of 313.7 kB",
        "images of 1 x 8 x 8 (channels, height, width), pixels from 0 to 1, mean 0.5, std 0.25",
    ):
        assert fact in text, fact


def test_a_card_says_that_no_data_was_used() -> None:
    assert "Only the full-precision model, and 128 samples that were synthesised from it. No images and" in card()
    assert "synthesised from it (hash of the bank `cd00`). No images and" in card(bank_hash="cd00")


@pytest.mark.parametrize(("num_samples", "samples"), [(128, ", 128 samples that were synthesised from it"), (0, "")])
def test_a_card_says_how_many_images_were_used(num_samples: int, samples: str) -> None:
    text = card(images=GivenImages(count=12, sha256="cd" * 32), num_samples=num_samples)
    given = f"12 unlabelled images (SHA-256 of their pixels `{'cd' * 32}`)"
    assert f"The full-precision model{samples} and {given}. It was not made without data" in text
    assert "No images" not in text


def test_a_card_states_the_estimate_as_one() -> None:
    text = card()
    assert "Not measured. Estimated without real images: a drop of 1.3 points (0.3 to 2.2, 90 %)" in text
    assert "An estimate is no measurement" in text
    assert "Nobody has seen its answers to real images yet" in text


def test_a_card_states_what_was_measured_and_not_the_estimate() -> None:
    text = card(MEASURED)
    assert "Measured on 1,000 labelled images (`test.npz`): top-1 98.50 %, in full precision 98.90 %" in text
    assert "a drop of 0.40 points (0.03 to 0.77, 90 %)" in text
    assert "stimate" not in text
    assert "Nobody has seen" not in text


def test_a_card_says_that_an_estimate_is_withheld_and_why() -> None:
    text = card(estimate=None, warnings=("statistics: the network has no batch norms",))
    assert "there is no estimate, because a warning below doubts the samples" in text
    assert "- statistics: the network has no batch norms." in text
    assert "because no samples were held out" in card(estimate=None, num_held_out=0)
    assert "because a warning below doubts" in card(estimate=None, num_held_out=0, has_batch_norms=False)


def test_a_card_does_not_state_a_measurement_that_says_nothing() -> None:
    doubted = MEASURED.replace(warnings=("data: the full-precision model is guessing",))
    text = card(doubted)
    assert "Unknown. The measurement says nothing: data: the full-precision model is guessing." in text
    assert "98.5" not in text


def test_a_card_lists_files_with_the_runtimes_that_ran_them() -> None:
    text = card()
    assert "| `student.onnx` | 42.7 kB | ONNX Runtime 1.22 | 256 | 99.61 % | 9 of 10 |" in text
    assert "Runtimes that cannot run a file: - X" in text
    assert "| samples |" in text
    assert "| images of noise |" in card(num_samples=0, num_held_out=0, estimate=None)


def test_a_card_says_which_files_were_not_run() -> None:
    package = Export(
        file="student.mlpackage", num_layers=10, num_bytes=90_000, num_samples=0, comparisons=(), not_run="no Mac here"
    )
    alone = model_card(summary(), tiny_settings(), None, [package])
    assert "- `student.mlpackage`, 90.0 kB: no Mac here." in alone
    assert "Each file was compared" not in alone
    both = model_card(summary(), tiny_settings(), None, [EXPORT, package])
    assert "| `student.onnx` | 42.7 kB |" in both
    assert "Files that were not run:\n\n- `student.mlpackage`" in both


def test_a_card_says_the_bits_of_the_first_and_the_last_layer() -> None:
    assert "w4a4 (weights and activations), first and last layer at 8, except" in card(first_last_bits=8)


def test_a_card_is_known_to_belong_to_its_student() -> None:
    text = model_card(summary(), tiny_settings(), None, [])
    assert belongs_to(text, summary(warnings=("later",)))
    assert not belongs_to(text, summary(finished="2026-12-01T10:00:00+00:00"))
    assert not belongs_to("# My own card", summary())


def test_names_that_a_user_gave_are_no_markdown() -> None:
    text = card(model="<script>`[x](y)|.py:build", layer_bits="a`b=w8a8")
    assert "# _script___x_(y)_.py:build at w4a4" in text
    assert "except `a_b=w8a8`" in text


def test_the_estimate_of_a_student_trained_for_long_is_said_to_tend_to_be_too_low() -> None:
    trained, short = summary(num_steps=8000), summary(num_steps=200)
    assert "up to twice as much" in trained.text()
    assert "up to twice as much" in card(num_steps=8000)
    assert "twice as much" not in short.text() + card(num_steps=200) + card(MEASURED, num_steps=8000)
    assert not summary(num_steps=8000, estimate=None).caution
