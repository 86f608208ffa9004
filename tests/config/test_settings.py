import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from pydantic import BaseModel, ValidationError

from qimera.config import settings as module
from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.input_spec import InputSpec
from qimera.config.run_settings import RunSettings
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    LabelSettings,
    QuantizationSettings,
    SynthesisSettings,
)
from qimera.errors import ConfigError
from qimera.report.layers import LayerReport
from tests.networks import SPEC

# --- input ------------------------------------------------------------------------------------------------------------


def spec(**changes: object) -> InputSpec:
    values: dict[str, object] = {"shape": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    return InputSpec(**{**values, **changes})


WRONG_INPUTS = {
    "no channels": ({"shape": (0, 16, 16)}, r"shape must be channels \(1 to 4\).*given 0,16,16$"),
    "five channels": ({"shape": (5, 16, 16)}, r"channels \(1 to 4\)"),
    "seven pixels": ({"shape": (3, 7, 16)}, r"at least 8"),
    "two numbers": ({"shape": (16, 16)}, "InputSpec: shape"),
    "one mean": ({"mean": (0.5,)}, r"mean must have one value per channel \(3\), given 1: 0.5"),
    "four std": ({"std": (1, 1, 1, 1)}, r"std must have one value per channel \(3\), given 4"),
    "zero std": ({"std": (1, 0, 1)}, r"std must be positive, given 1,0,1"),
    "negative std": ({"std": (1, -1, 1)}, "std must be positive"),
    "empty range": ({"pixel_range": (1, 1)}, "pixel_range must be LOW,HIGH with LOW < HIGH, given 1,1"),
    "words": ({"mean": "grey"}, "mean: .*given 'grey'"),
    "unknown field": ({"colour": 3}, "^InputSpec: colour: there is no such setting$"),
    "misspelt field": ({"stdd": 3}, "stdd: there is no such setting; did you mean std\\?"),
    "channels last": ({"shape": (16, 17, 3)}, "^InputSpec: shape must be .*given 16,17,3; did you mean 3,16,17\\?"),
    "mean of 255": ({"mean": (123.7, 116, 103)}, r"mean 123.7,116,103 cannot .*; did you mean pixel_range 0,255\?"),
    "std of 255": (
        {"mean": (0, 0, 0), "std": (58, 57, 57)},
        r"std 58,57,57 cannot .*; did you mean pixel_range 0,255\?",
    ),
    "mean of 1": ({"mean": (0.5,) * 3, "pixel_range": (1, 255)}, r"did you mean pixel_range 0,1\?"),
    "mean of no range": ({"mean": (-2.0,) * 3}, "cannot be that of pixels from 0 to 1 .*; give all in one unit"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_a_wrong_input_spec_is_refused_with_field_and_value(case: str) -> None:
    changes, message = WRONG_INPUTS[case]
    with pytest.raises(ConfigError, match=message) as refusal:
        spec(**changes)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize("pixel_range", [(0, 1), (0, 255), (-1, 1), (0, 0.5)])
def test_a_mean_of_0_and_a_std_of_1_leave_pixels_as_they_are_in_every_unit(pixel_range: tuple[float, float]) -> None:
    made = spec(mean=(0,) * 3, std=(1,) * 3, pixel_range=pixel_range)
    assert (made.low.unique().tolist(), made.high.unique().tolist()) == ([pixel_range[0]], [pixel_range[1]])


def test_the_darkest_and_brightest_pixel_are_normalised_as_in_training() -> None:
    made = spec(shape=(2, 8, 8), mean=(100, 50), std=(50, 25), pixel_range=(0, 255))
    torch.testing.assert_close(made.low.flatten(), torch.tensor([-2.0, -2.0]))
    torch.testing.assert_close(made.high.flatten(), torch.tensor([3.1, 8.2]))


def test_every_pixel_survives_normalisation() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for made in (
        SPEC,
        spec(pixel_range=(-1, 1)),
        spec(mean=(123.7, 116.3, 103.5), std=(58, 57, 57), pixel_range=(0, 255)),
    ):
        assert torch.equal(made.to_pixels(made.normalize(pixels)), pixels)


def test_values_outside_of_the_range_become_the_nearest_pixel() -> None:
    images = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert SPEC.to_pixels(images)[:, 0, 0, 0].tolist() == [0, 255]


# --- what all settings have in common ---------------------------------------------------------------------------------

WRONG_VALUES = {
    "probability above one": (LabelSettings, {"superposition_probability": 1.5}, "given 1.5"),
    "one superposed class": (LabelSettings, {"num_superposed_classes": 1}, "num_superposed_classes: .*2, given 1"),
    "batch of one": (GeneratorSettings, {"batch_size": 1}, "batch_size: .*given 1"),
    "rate zero": (GeneratorSettings, {"learning_rate": 0}, "learning_rate"),
    "no steps": (DirectSettings, {"num_steps": 0}, "num_steps: .*given 0"),
    "unknown start": (DirectSettings, {"start": "photograph"}, "start: .*'noise' or 'generator', given 'photograph'"),
    "a single sample": (
        SynthesisSettings,
        {"num_generated": 1, "num_optimized": 0},
        "num_generated and num_optimized must give at least 2 samples",
    ),
    "one bit": (QuantizationSettings, {"weight_bits": 1}, "weight_bits: .*2, given 1"),
    "nine bits": (QuantizationSettings, {"activation_bits": 9}, "activation_bits: .*8, given 9"),
    "unknown scheme": (QuantizationSettings, {"scheme": "mixed"}, "scheme: .*'hardware' or 'paper', given 'mixed'"),
    "negative weight": (DistillationSettings, {"kl_weight": -1}, "kl_weight"),
    "share above one": (DistillationSettings, {"fresh_share": 2}, "fresh_share"),
    "temperature zero": (DistillationSettings, {"temperature": 0}, "temperature"),
    "generator without an aim": (GeneratorSettings, {"ce_weight": 0, "bns_weight": 0}, "nothing would be learned"),
    "images without an aim": (
        DirectSettings,
        {"ce_weight": 0, "bns_weight": 0, "tv_weight": 0},
        "ce_weight, bns_weight and tv_weight are all 0",
    ),
    "misspelt": (
        DistillationSettings,
        {"tempeature": 2},
        "tempeature: there is no such setting; did you mean temperature",
    ),
    "two at once": (QuantizationSettings, {"weight_bits": 1, "scheme": "x"}, "weight_bits: .*; scheme: "),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_wrong_value_is_refused_with_class_field_and_value(case: str) -> None:
    kind, values, message = WRONG_VALUES[case]
    with pytest.raises(ConfigError, match=message) as refusal:
        kind(**values)
    assert str(refusal.value).startswith(f"{kind.__name__}: ")


def all_settings() -> list[type[BaseModel]]:
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    return [each for each in found if each.__module__ == module.__name__ and not each.__name__.startswith("_")]


@pytest.mark.parametrize("kind", all_settings(), ids=lambda kind: kind.__name__)
def test_settings_are_frozen_and_documented(kind: type[BaseModel]) -> None:
    assert kind.model_config["frozen"] is True
    assert kind.model_config["extra"] == "forbid"
    assert kind.__doc__


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_copy_with_a_wrong_value_is_refused_as_new_settings_are(case: str) -> None:
    kind, values, message = WRONG_VALUES[case]
    with pytest.raises(ConfigError, match=message):
        kind().replace(**values)
    with pytest.raises(ConfigError, match=message):
        kind().model_copy(update=values)


def test_a_copy_keeps_what_was_given_and_checks_only_what_it_is() -> None:
    settings = DistillationSettings(num_steps=0, kl_weight=0.5)
    copied = settings.replace(schedule="milestones", milestones=[3, 4])
    assert copied == DistillationSettings(num_steps=0, kl_weight=0.5, schedule="milestones", milestones=(3, 4))
    assert copied.model_fields_set == {"num_steps", "kl_weight", "schedule", "milestones"}
    assert settings.replace() == settings.model_copy() == settings


def test_settings_cannot_be_changed() -> None:
    settings = LabelSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.superposition = False


# --- files ------------------------------------------------------------------------------------------------------------


def run_settings() -> RunSettings:
    return RunSettings(
        model="mnist_cnn",
        recipe="fast",
        seed=3,
        input=SPEC,
        synthesis=SynthesisSettings(num_generated=10, labels=LabelSettings(num_superposed_classes=4)),
        quantization=QuantizationSettings(weight_bits=3, layer_bits=parse_layer_bits("fc=8")),
        distillation=DistillationSettings(schedule="milestones", milestones=(10, 20)),
    )


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    run_settings().save(path)
    assert RunSettings.load(str(path)) == run_settings()


def test_every_default_is_written(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    run_settings().save(path)
    written = json.loads(path.read_text())
    assert set(written) == {"qimera", *RunSettings.model_fields}
    assert set(written["distillation"]) == set(DistillationSettings.model_fields)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write settings as another version would."""
    run_settings().save(path)
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))
    return path


def test_a_file_of_a_version_with_fewer_settings_is_read_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def as_before(written: dict[str, Any]) -> None:
        written["qimera"] = "0.0.9"
        del written["seed"], written["distillation"]["flip"]

    read = RunSettings.load(changed(tmp_path / "settings.json", as_before))
    assert read == run_settings().model_copy(update={"seed": 0})
    assert "settings.json: of qimera 0.0.9, which did not have" in caplog.text
    assert "did not have seed (now 0), distillation.flip (now True)" in caplog.text


def test_nothing_is_said_of_what_a_person_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def by_hand(written: dict[str, Any]) -> None:
        del written["qimera"], written["distillation"]["flip"]

    assert RunSettings.load(changed(tmp_path / "settings.json", by_hand)) == run_settings()
    assert caplog.text == ""


def test_a_file_of_a_version_with_more_settings_is_refused(tmp_path: Path) -> None:
    def as_later(written: dict[str, Any]) -> None:
        written["qimera"] = "9.0"
        written["distillation"]["teachers"] = 2

    message = r"settings.json \(written by qimera 9.0, this is .*DistillationSettings: teachers: there is no such"
    with pytest.raises(ConfigError, match=message):
        RunSettings.load(changed(tmp_path / "settings.json", as_later))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "settings.json: not a file of settings"),
        ("[" * 100_000, "settings.json: not a file of settings"),
        ("{}", "settings.json: RunSettings: model: "),
        ("[]", "settings.json: not a file of settings, but an object of type list"),
        ('{"synthesis": {"labels": {"num_superposed_classes": 0}}}', "settings.json: .*num_superposed_classes"),
    ],
)
def test_a_damaged_file_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunSettings.load(path)


# --- bits -------------------------------------------------------------------------------------------------------------


@given(weight=st.integers(2, 8), activation=st.integers(2, 8), upper=st.booleans())
def test_bits_are_read_as_weights_then_activations(weight: int, activation: int, upper: bool) -> None:
    text = f"w{weight}a{activation}"
    assert parse_bits(f" {text.upper() if upper else text} ") == (weight, activation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w1a4", "bits: weight bits must be 2 to 8, given 1 in 'w1a4'"),
        ("w4a9", "bits: activation bits must be 2 to 8, given 9"),
        ("w4a16", "activation bits must be 2 to 8, given 16"),
        ("4", "bits: expected the form w4a4.*given '4'"),
        ("w4", "expected the form w4a4"),
        ("a4w4", "expected the form w4a4"),
        ("w4a4b4", "expected the form w4a4"),
        ("", "expected the form w4a4"),
        ("w-4a4", "expected the form w4a4"),
    ],
)
def test_other_bits_are_refused_with_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_bits(text)


def bits_of(rules: str, layer: str) -> tuple[int, int]:
    return QuantizationSettings(weight_bits=4, activation_bits=5, layer_bits=parse_layer_bits(rules)).bits_of(layer)


@pytest.mark.parametrize(
    ("rules", "layer", "expected"),
    [
        ("", "conv1", (4, 5)),
        ("conv1=8", "conv1", (8, 8)),
        ("conv1=8", "conv10", (4, 5)),
        ("conv1=8", "layer1.conv1", (4, 5)),
        ("*conv1=w8a6", "layer1.conv1", (8, 6)),
        ("*fc*=w3a4, conv1=8", "head.fc.out", (3, 4)),
        ("conv?=8", "conv2", (8, 8)),
        ("*=2,conv1=8", "conv1", (8, 8)),
        ("conv1=8,*=2", "conv1", (2, 2)),
        ("layer[12].*=3", "layer2.0.conv1", (3, 3)),
        ("layer[12].*=3", "layer3.0.conv1", (4, 5)),
        ("FC=8", "fc", (4, 5)),
        (" conv1=8 ,, ", "conv1", (8, 8)),
    ],
)
def test_the_last_matching_rule_decides_a_layers_bits(rules: str, layer: str, expected: tuple[int, int]) -> None:
    assert bits_of(rules, layer) == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("conv1", "layer_bits: expected PATTERN=BITS such as conv1=8.*given 'conv1'"),
        ("=8", "expected PATTERN=BITS.*given '=8'"),
        ("conv1=9", "weight bits must be 2 to 8, given 9"),
        ("conv1=1", "must be 2 to 8"),
        ("conv1=", "expected the form w4a4"),
        ("conv1=eight", "expected the form w4a4"),
    ],
)
def test_a_wrong_rule_is_refused(rules: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_layer_bits(rules)


def test_a_training_that_learns_nothing_is_refused() -> None:
    nothing = {"kl_weight": 0.0, "ce_weight": 0.0, "feature_weight": 0.0}
    with pytest.raises(ConfigError, match="nothing would be learned; set one of them above 0, or num_steps to 0"):
        DistillationSettings(**nothing)
    assert DistillationSettings(**nothing, num_steps=0).num_steps == 0
    assert DistillationSettings(**{**nothing, "ce_weight": 1.0}).ce_weight == 1.0


def test_a_target_of_the_scheme_that_no_kernel_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match="target openvino is for scheme hardware"):
        QuantizationSettings(scheme="paper", target="openvino")


def test_numbers_that_are_none_come_back_from_json(tmp_path: Path) -> None:
    report = LayerReport(name="a", weight_bits=4, activation_bits=4, error=float("nan"), cost=float("inf"))
    report.save(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    loaded = LayerReport.load(tmp_path / "a.json")
    assert math.isnan(loaded.error)
    assert loaded.cost == float("inf")


def test_every_alternative_needs_the_name_of_its_recipe() -> None:
    values = {"model": "toy.py:build", "input": SPEC, "synthesis": SynthesisSettings()}
    ways = {"quantization": QuantizationSettings(), "distillation": DistillationSettings()}
    assert RunSettings(recipe="a,b", alternatives=(DistillationSettings(),), **values, **ways).recipe == "a,b"
    with pytest.raises(ConfigError, match=r"recipe must name distillation and each of the 1 .*given 'a'"):
        RunSettings(recipe="a", alternatives=(DistillationSettings(),), **values, **ways)
