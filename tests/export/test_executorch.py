"""ExecuTorch programs; slow, and only where executorch is installed: ``pip install 'qimera[executorch]'``."""

from functools import partial
from pathlib import Path

import pytest

from qimera.config.bits import parse_bits
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError, UnsupportedModelError
from qimera.export import executorch
from qimera.export.executorch import export_executorch
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


def student_of(teacher: Teacher, bank: SampleBank, bits: str, scheme: str = "hardware") -> Student:
    weight_bits, activation_bits = parse_bits(bits)
    settings = QuantizationSettings(weight_bits=weight_bits, activation_bits=activation_bits, scheme=scheme)
    student = Student(teacher, settings)
    student.initialize_ranges_([bank.input_spec.normalize(bank.pixels[:64])])
    return student


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4", "w3a3"])
def test_a_program_for_xnnpack_computes_what_the_student_computes(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, bits: str
) -> None:
    pytest.importorskip("executorch", reason="pip install 'qimera[executorch]'")
    student = student_of(teacher, bank, bits)
    verification = export_executorch(student, tmp_path / "new" / "model.pte", bank, min_agreement=95.0)
    comparison = verification.comparisons[0]
    assert comparison.float_layers == ("fc",)
    assert comparison.agreement >= 97
    assert comparison.identical >= 50
    assert (tmp_path / "new" / "model.pte").stat().st_size == verification.num_bytes


@pytest.mark.slow
def test_layers_without_kernel_are_refused_by_name(
    tmp_path: Path, teacher: Teacher, bank: SampleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("executorch", reason="pip install 'qimera[executorch]'")
    from executorch.backends.xnnpack.partition import xnnpack_partitioner
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType

    only_floats = partial(xnnpack_partitioner.XnnpackPartitioner, config_precisions=ConfigPrecisionType.FP32)
    monkeypatch.setattr(xnnpack_partitioner, "XnnpackPartitioner", only_floats)
    with pytest.raises(UnsupportedModelError, match=r"XNNPACK has no integer kernel for .*quantized_decomposed"):
        export_executorch(student_of(teacher, bank, "w8a8"), tmp_path / "model.pte")
    assert not (tmp_path / "model.pte").exists()


def test_what_is_missing_is_said(tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda _: None)
    student = Student(teacher, QuantizationSettings())
    with pytest.raises(ConfigError, match=r"pip install 'qimera\[executorch\]'"):
        export_executorch(student, tmp_path / "model.pte")
