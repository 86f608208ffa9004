"""Files for microcontrollers, where tflite-micro is installed: ``pip install 'qimera[tflm]'``."""

import copy
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qimera.config.bits import parse_bits
from qimera.config.settings import QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError, UnsupportedModelError, VerificationError
from qimera.export.comparison import compare
from qimera.litert import micro
from qimera.litert.micro import MicroRuntime, export_tflm
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import SPEC, TinyNet, toy_pixels

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from ai_edge_litert import schema_py_generated as schema

from qimera.litert.export import export_litert
from qimera.lowering.flatbuffer import FlatFile
from qimera.lowering.model import PIXELS


@pytest.fixture
def _micro() -> None:
    pytest.importorskip("tflite_micro", reason="pip install 'qimera[tflm]'")


def student_of(teacher: Teacher, bits: str = "w4a4", target: str = "tflm") -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, target=target)
    return shared.fitted(teacher, shared.noise(32), settings)


def types_in(content: bytes) -> dict[str, int]:
    """Return the type of each tensor by its name."""
    graph = schema.Model.GetRootAs(content).Subgraphs(0)
    tensors = (graph.Tensors(index) for index in range(graph.TensorsLength()))
    return {tensor.Name().decode(): tensor.Type() for tensor in tensors}


@pytest.mark.usefixtures("_micro")
def test_a_file_for_microcontrollers_is_the_student_bit_for_bit(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, capfd: pytest.CaptureFixture[str]
) -> None:
    student = student_of(teacher)
    verification = export_tflm(student, tmp_path / "new" / "my-model.tflite", bank)
    (found,) = verification.comparisons
    assert (found.agreement, found.identical) == (100, 100)
    assert found.runtime.startswith("tflite-micro")
    assert found.float_layers == ("fc",)
    assert found.arena_bytes is not None
    assert f"memory of the interpreter: {found.arena_bytes:,} bytes" in verification.text()
    assert capfd.readouterr().err == ""  # what the interpreter writes there is kept from the screen
    content = (tmp_path / "new" / "my-model.tflite").read_bytes()
    assert MicroRuntime(content, arena_size=found.arena_bytes).arena_bytes() == found.arena_bytes
    with pytest.raises(UnsupportedModelError, match="tflite-micro cannot run part of the model"):
        MicroRuntime(content, arena_size=found.arena_bytes - 256)
    types = types_in(content)
    convolutions = [f"{name}.weight" for name in ("conv1", "conv2", "conv3", "depthwise", "pointwise")]
    assert {types[name] for name in convolutions} == {schema.TensorType.INT4}


@pytest.mark.usefixtures("_micro")
def test_beside_the_file_lie_its_bytes_as_c(tmp_path: Path, teacher: Teacher) -> None:
    (found,) = export_tflm(student_of(teacher), tmp_path / "7-model.tflite").comparisons
    content = (tmp_path / "7-model.tflite").read_bytes()
    source, header = ((tmp_path / f"7-model.{kind}").read_text() for kind in ("cc", "h"))
    assert bytes(int(each, 16) for each in re.findall(r"0x([0-9a-f]{2})", source)) == content
    assert "extern const unsigned char _7_model[];" in header
    assert f"_7_model_size = {len(content)};" in header
    assert f"_7_model_arena_size = {found.arena_bytes};" in header
    assert "// Its operations: ADD, CONV_2D, DEPTHWISE_CONV_2D, DEQUANTIZE, FULLY_CONNECTED, " in header
    program = '#include "7-model.cc"\nint main() { return sizeof(_7_model) == _7_model_size ? 0 : 1; }\n'
    (tmp_path / "main.cpp").write_text(program)
    subprocess.run(["g++", "-Wall", "-Werror", "-o", tmp_path / "program", tmp_path / "main.cpp"], check=True)
    subprocess.run([tmp_path / "program"], check=True)


@pytest.mark.usefixtures("_micro")
def test_a_file_may_be_called_by_any_letters(tmp_path: Path, teacher: Teacher) -> None:
    export_tflm(student_of(teacher), tmp_path / "mod\u00e8le.tflite")
    header = (tmp_path / "mod\u00e8le.h").read_text(encoding="utf-8")
    assert "extern const unsigned char mod_le[];" in header
    assert '#include "mod\u00e8le.h"' in (tmp_path / "mod\u00e8le.cc").read_text(encoding="utf-8")


@pytest.mark.usefixtures("_micro")
def test_a_file_may_be_called_by_a_word_of_cpp(tmp_path: Path, teacher: Teacher) -> None:
    export_tflm(student_of(teacher), tmp_path / "switch.tflite")
    (tmp_path / "main.cpp").write_text('#include "switch.cc"\nint main() { return _switch_size == 0; }\n')
    subprocess.run(["g++", "-o", tmp_path / "program", tmp_path / "main.cpp"], check=True)


@pytest.mark.usefixtures("_micro")
@pytest.mark.parametrize("suffix", [".cc", ".h"])
def test_a_file_does_not_take_the_place_of_its_own_source(tmp_path: Path, teacher: Teacher, suffix: str) -> None:
    with pytest.raises(ConfigError, match=r"go beside the file; call the file model\.tflite"):
        export_tflm(student_of(teacher), tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_micro")
@pytest.mark.parametrize("bits", ["w4a4", pytest.param("w8a8", marks=pytest.mark.slow)])
def test_files_take_pixels_and_return_integers(tmp_path: Path, teacher: Teacher, bank: SampleBank, bits: str) -> None:
    student = student_of(teacher, bits)
    options = {"include_preprocessing": True, "integer_logits": True}
    (found,) = export_tflm(student, tmp_path / "model.tflite", bank, min_agreement=95.0, **options).comparisons
    assert found.float_layers == ()
    types = types_in((tmp_path / "model.tflite").read_bytes())
    assert (types["pixels"], types["logits"]) == (schema.TensorType.UINT8, schema.TensorType.INT8)


@pytest.mark.usefixtures("_micro")
def test_operations_without_a_kernel_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot run part of the model: .*'GELU'; export to litert"):
        export_tflm(student_of(shared.teacher_of("transformer")), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_micro")
def test_kernels_that_refuse_their_tensors_only_when_they_run_are_named_too(capfd: pytest.CaptureFixture[str]) -> None:
    """NEG, for one, has a kernel for int8 in LiteRT, and none in tflite-micro."""
    file = FlatFile()
    image, logits = (file.tensor(name, (1, 4), np.int8, PIXELS) for name in ("input", "logits"))
    file.operation("NEG", [image], [logits])
    runtime = MicroRuntime(file.content({"input": image}, {"logits": logits}, "qimera"))
    with pytest.raises(UnsupportedModelError, match=r"cannot run part of the model: .*; export to litert"):
        runtime(np.zeros((1, 4), np.int8))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ['mo"del', "mo\\del", "mo\ndel"])
def test_a_name_that_cpp_cannot_include_is_refused(tmp_path: Path, teacher: Teacher, name: str) -> None:
    with pytest.raises(ConfigError, match=r"includes no file with such a character .*; call it model\.tflite"):
        export_tflm(student_of(teacher), tmp_path / f"{name}.tflite")


@pytest.mark.usefixtures("_micro")
@pytest.mark.parametrize(("target", "advice"), [("onnxruntime", "; quantize with --target tflm; no"), ("tflm", ";")])
def test_a_file_that_disagrees_is_not_written(
    tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, target: str, advice: str
) -> None:
    def upside_down(runtime: str, expected: np.ndarray, actual: np.ndarray, *others: object) -> object:
        return compare(runtime, expected, -actual, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(micro, "compare", upside_down)
    with pytest.raises(VerificationError, match=f"at least 99 % are required{advice}"):
        export_tflm(student_of(teacher, target=target), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro, "find_spec", lambda name: None if name == "tflite_micro" else True)
    with pytest.raises(ConfigError, match=r"needs tflite_micro; pip install 'qimera\[tflm\]'"):
        export_tflm(Student(teacher, QuantizationSettings()), tmp_path / "model.tflite")


def test_the_kernels_that_a_student_is_made_for_decide(tmp_path: Path, teacher: Teacher, bank: SampleBank) -> None:
    student = student_of(teacher, "w3a3", "litert-builtin")
    on_phones, built_in = export_litert(student, tmp_path / "model.tflite", bank).comparisons
    assert (built_in.identical, built_in.note) == (100, "")
    assert "rounds sums once" in on_phones.note


@pytest.mark.usefixtures("_micro")
def test_of_classes_that_integers_cannot_tell_apart_a_file_may_pick_either(tmp_path: Path, tiny_model: TinyNet) -> None:
    """The weights of two pairs of classes differ by 1 %, their logits mostly by less than a step of int8."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        row = model.fc.weight[0]
        model.fc.weight.copy_(torch.stack([row, 1.01 * row, -row, -1.01 * row, 0 * row]))
        model.fc.bias.zero_()
    alike = Teacher.capture(model, SPEC)
    student = student_of(alike, "w8a8")
    pixels, _ = toy_pixels(32, seed=1)
    bank = SampleBank.from_pixels(pixels, torch.full((32, 5), 0.2), alike, SynthesisSettings(num_held_out=0), seed=0)
    (found,) = export_tflm(student, tmp_path / "model.tflite", bank, integer_logits=True).comparisons
    assert found.agreement == 100
