import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.cli.options import capture, resolve, settings_of_bank
from qimera.config.recipes import recipe
from qimera.errors import ConfigError
from qimera.runs.directory import RunDirectory
from tests.command_line import INPUT, SMALL, qimera, said, tiny_settings, write_model_file


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write_model_file(tmp_path)


@pytest.mark.parametrize(
    ("function", "options", "exit_code", "message"),
    [
        ("build_broken", INPUT, 3, r"4\.weight: 1536 of 1536 values are NaN or infinite"),
        ("build_overflowing", INPUT, 3, "returns NaN or infinite logits for random images"),
        ("build_until_interrupted", INPUT, 130, "interrupted; the same command continues"),
        ("build", ("--input-shape", "3,8,8", "--mean", "0,0,0", "--std", "1,1,1"), 2, r"input_shape \(3, 8, 8\)"),
        ("build", ("--input-shape", "1,8", "--mean", "0", "--std", "1"), 2, "--input-shape: expected channels"),
        ("build", ("--input-shape", "1,8,8", "--mean", "0,0,0", "--std", "1"), 2, r"mean must have one value .* \(1\)"),
        ("build", ("--input-shape", "1,8,8", "--mean", "zero", "--std", "1"), 2, "--mean: expected numbers"),
        ("build", ("--input-shape", "1,8,8", "--mean", "0", "--std", "0"), 2, "std must be positive"),
        ("build", ("--input-shape", "1,8,8"), 2, "--mean, --std: missing"),
        ("build", (*INPUT, "--pixel-range", "1,0"), 2, "--pixel-range must be LOW,HIGH"),
        ("build", (*INPUT, "--bits", "w1a4"), 2, "qimera: --bits: weight bits must be 2 to 8, given 1"),
        ("build", (*INPUT, "--bits", "w4a9"), 2, "activation bits must be 2 to 8, given 9"),
        ("build", (*INPUT, "--bits", "4"), 2, "expected the form w4a4"),
        ("build", (*INPUT, "--layer-bits", "4=1"), 2, "qimera: --layer-bits: 4: weight bits must be 2 to 8, given 1"),
        ("build", (*INPUT, "--layer-bits", "fc*=8"), 2, r"--layer-bits: 'fc\*' fits none of the 2 layers"),
        ("build", (*INPUT, "--first-last-bits", "1"), 2, "qimera: --first-last-bits: Input should be .* or 8, given 1"),
        ("build", (*INPUT, "--budget", "size"), 2, "qimera: --budget: expected size=SHARE"),
        ("build", (*INPUT, "--recipe", "quick"), 2, "--recipe: no recipe called 'quick'; there are ptq, fast"),
        ("build", (*INPUT, "--recipe", "ptq, fast,ptq"), 2, "--recipe: each can be named once, given ptq, fast,ptq"),
        ("build", (*INPUT, "--scheme", "soft"), 2, "soft"),
        ("build", (*INPUT, "--scheme", "paper", "--target", "onnxruntime"), 2, "--target: onnxruntime is for --scheme"),
        ("build", (*INPUT, "--seed", "-1"), 2, "seed"),
        ("build", (*INPUT, "--weights", "missing.pt"), 2, "no such file: missing.pt"),
        ("build", (*INPUT, "--bank", "missing"), 2, "bank missing"),
        ("biuld", INPUT, 2, "did you mean build"),
    ],
)
def test_a_wrong_option_of_quantize_is_refused_before_anything_is_written(
    tmp_path: Path, model_file: Path, function: str, options: tuple[str, ...], exit_code: int, message: str
) -> None:
    output = tmp_path / "runs" / "run"
    result = qimera("quantize", f"{model_file}:{function}", *options, "--output", output)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert re.search(message, said(result))
    assert "Traceback" not in result.stderr
    if exit_code != 4:  # a run that diverges has begun, and leaves its metrics
        assert not output.parent.exists()


def test_wrong_bits_behind_right_ones_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    result = qimera("quantize", SMALL, *INPUT, "--recipe", "ptq", "--bits", "w8a8,w9a9", "--output", tmp_path / "runs")
    assert result.exit_code == 2
    assert "weight bits must be 2 to 8, given 9 in 'w9a9'" in said(result)
    assert not (tmp_path / "runs").exists()


def test_a_run_without_a_model_is_refused(tmp_path: Path) -> None:
    result = qimera("quantize", "--output", tmp_path / "run")
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "MODEL: missing" in said(result)


def test_a_model_that_is_neither_embedded_nor_a_file_is_refused(tmp_path: Path) -> None:
    result = qimera("quantize", "mnist_cn", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "did you mean mnist_cnn?" in said(result)
    result = qimera("quantize", f"{tmp_path}/nothing.py:build", *INPUT, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "nothing.py" in said(result)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_architecture_are_refused(tmp_path: Path, model_file: Path) -> None:
    save_file(nn.Conv2d(1, 8, 5).state_dict(), tmp_path / "other.safetensors")
    options = (*INPUT, "--weights", tmp_path / "other.safetensors", "--output", tmp_path / "run")
    result = qimera("quantize", f"{model_file}:build", *options)
    assert result.exit_code == 2
    assert "does not fit Sequential" in said(result)
    assert not (tmp_path / "run").exists()


class WritesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_in_it_is_refused_and_not_executed(tmp_path: Path, model_file: Path) -> None:
    torch.save({"0.weight": WritesAFile(tmp_path / "executed")}, tmp_path / "weights.pt")
    options = (*INPUT, "--weights", tmp_path / "weights.pt", "--output", tmp_path / "run")
    result = qimera("quantize", f"{model_file}:build", *options)
    assert result.exit_code == 2
    assert "was not executed" in said(result)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "model: Field required"),
        ("not JSON", "settings.json"),
        (tiny_settings().model_dump_json().replace('"weight_bits":4', '"weight_bits":9'), "weight_bits.*given 9"),
        (tiny_settings().model_dump_json().replace('"recipe"', '"receipt"'), "receipt"),
    ],
)
def test_a_wrong_settings_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    result = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert re.search(message, said(result))
    assert not (tmp_path / "run").exists()


def test_of_several_recipes_the_first_makes_the_bank_and_the_others_are_alternatives(model_file: Path) -> None:
    model = ModelOptions(f"{model_file}:build", None, "1,8,8", "0.5", "0.25", None, None)
    settings = resolve(model, RunOptions(recipe="fast, ptq")).settings
    fast, ptq = (recipe(name, settings.input, 3) for name in ("fast", "ptq"))
    assert settings.recipe == "fast,ptq"
    assert settings.synthesis == fast.synthesis
    assert settings.distillation == fast.distillation
    assert settings.alternatives == (ptq.distillation,)


def test_a_bank_by_several_recipes_is_refused_with_the_one_that_would_make_it(tmp_path: Path, model_file: Path) -> None:
    options = (*INPUT, "--recipe", "ptq,fast", "--output", tmp_path / "bank")
    result = qimera("synthesize", f"{model_file}:build", *options)
    assert result.exit_code == 2
    assert "--recipe: a bank is made by one recipe, given ptq,fast; give ptq" in said(result)
    assert [each.name for each in tmp_path.iterdir()] == [model_file.name]


def test_a_bank_in_the_place_of_the_working_directory_is_refused() -> None:
    result = qimera("synthesize", SMALL, *INPUT, "--output", ".")
    assert result.exit_code == 2
    assert ".: exists already; choose another --output" in said(result)


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--device", "cuda"), ("--set", "direct.num_steps=2")])
def test_how_to_make_a_bank_that_is_made_already_is_refused(
    tmp_path: Path, model_file: Path, option: tuple[str, str]
) -> None:
    options = (*INPUT, "--bank", tmp_path / "bank", *option, "--output", tmp_path / "npz")
    result = qimera("synthesize", f"{model_file}:build", *options)
    assert result.exit_code == 2
    assert f"--bank: its samples are made already, so leave out {option[0]}" in said(result)


def test_any_setting_can_be_set_by_its_dotted_name(model_file: Path) -> None:
    model = ModelOptions(f"{model_file}:build", None, "1,8,8", "0.5", "0.25")
    changes = [
        "labels.superposition=false",
        "quantization.edge_bits=6",
        "generator.milestones=[2, 4]",
    ]
    settings = resolve(model, RunOptions(recipe="ptq", steps=7, set_=changes)).settings
    assert not settings.synthesis.labels.superposition
    assert settings.quantization.edge_bits == 6
    assert settings.synthesis.generator.milestones == (2, 4)
    assert settings.distillation.num_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set_": ["labels.superposition"]}, "--set: expected NAME=VALUE such as .*, given 'labels.superposition'"),
        ({"set_": ["seed=3"]}, "--set: expected NAME=VALUE"),
        ({"set_": ["labels.superpositon=false"]}, "no such setting; did you mean superposition"),
        ({"set_": ["direct.num_steps=-3"]}, "--set: DirectSettings: num_steps: .*given -3"),
        ({"steps": 5, "recipe": "fast,ptq"}, "^--steps: distillation.num_steps is for one recipe, given fast,ptq"),
    ],
)
def test_a_setting_that_cannot_be_set_is_refused(model_file: Path, options: dict[str, Any], message: str) -> None:
    model = ModelOptions(f"{model_file}:build", None, "1,8,8", "0.5", "0.25")
    with pytest.raises(ConfigError, match=message):
        resolve(model, RunOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distillation.num_steps=3", "--set: expected NAME=VALUE such as .*, given 'distillation.num_steps=3'"),
        ("labels.superpositon=false", "no such setting; did you mean superposition"),
        ("direct.num_steps=-3", "--set: DirectSettings: num_steps: .*given -3"),
    ],
)
def test_a_setting_of_a_bank_that_cannot_be_set_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of_bank(capture(ModelOptions("mnist_cnn")), "ptq", [change])


def test_several_bits_make_several_runs_of_one_bank(tmp_path: Path) -> None:
    tiny = ("--recipe", "ptq", "--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=1")
    command = ("quantize", SMALL, *INPUT, "--bits", "w8a8,w4a4", *tiny, "--output", tmp_path / "runs")
    result = qimera(*command)
    assert result.exit_code == 0, said(result)
    runs = {bits: RunDirectory.open(tmp_path / "runs" / bits) for bits in ("w8a8", "w4a4")}
    assert [run.summary().bits for run in runs.values()] == ["w8a8", "w4a4"]
    assert runs["w8a8"].has_bank
    assert not runs["w4a4"].has_bank
    assert Path(runs["w4a4"].settings.bank) == tmp_path / "runs" / "w8a8" / "bank"
    assert "finished already" in said(qimera(*command))


def test_runs_of_several_bits_find_their_bank_after_their_folder_was_moved(tmp_path: Path) -> None:
    tiny = ("--recipe", "ptq", "--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=1")
    made = qimera("quantize", SMALL, *INPUT, "--bits", "w8a8,w4a4", *tiny, "--output", tmp_path / "here")
    assert made.exit_code == 0, said(made)
    (tmp_path / "here").rename(tmp_path / "there")
    found = qimera("report", tmp_path / "there" / "w4a4")
    assert found.exit_code == 0, said(found)


@pytest.mark.parametrize("bits", ["w4a4,w4a4", "w8a8,", ","])
def test_bits_that_are_named_twice_or_missing_are_refused(tmp_path: Path, bits: str) -> None:
    result = qimera("quantize", "mnist_cnn", "--bits", bits, "--output", tmp_path / "runs")
    assert result.exit_code == 2
    assert f"--bits: expected each once, with commas between, such as w8a8,w4a4, given {bits}" in said(result)
    assert not (tmp_path / "runs").exists()
