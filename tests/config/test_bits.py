import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qimera.config.bits import parse_layer_bits
from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.errors import ConfigError
from qimera.mixed_precision.allocation import allocate_bits
from qimera.pipeline import quantize_with
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import EMBEDDED_MODELS
from qimera.teacher.teacher import Teacher
from tests.command_line import qimera, said, tiny_settings

UNTRAINED = DistillationSettings(num_steps=0)
RULES = "fc=8,cnov1=8"
MISSPELT = QuantizationSettings(layer_bits=parse_layer_bits(RULES))
WITH_BUDGET = QuantizationSettings(layer_bits=parse_layer_bits(RULES), budget="size=0.2")
WAYS: dict[str, Callable[[Teacher, SampleBank], object]] = {
    "quantize_with": lambda teacher, bank: quantize_with(teacher, bank, MISSPELT, UNTRAINED),
    "quantize_with and a budget": lambda teacher, bank: quantize_with(teacher, bank, WITH_BUDGET, UNTRAINED),
    "allocate_bits": lambda teacher, bank: allocate_bits(teacher, bank, "size=0.2", layer_bits=RULES),
    "Student": lambda teacher, _: Student(teacher, MISSPELT),
    "Student.load_state": lambda teacher, _: Student.load_state("student.safetensors", teacher, MISSPELT),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_rule_for_a_layer_that_is_not_there_is_refused_with_the_nearest(
    teacher: Teacher, bank: SampleBank, way: str
) -> None:
    with pytest.raises(ConfigError, match=r"layer_bits: 'cnov1' fits none of the 6 layers \(nearest: conv1, conv"):
        WAYS[way](teacher, bank)


def test_a_file_of_settings_with_a_rule_for_no_layer_starts_no_run(tmp_path: Path) -> None:
    digits = EMBEDDED_MODELS["mnist_cnn"].input_spec
    tiny_settings("mnist_cnn", input=digits, quantization=MISSPELT).save(tmp_path / "settings.json")
    result = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    assert result.exit_code == 2
    message = r"qimera: --settings: .*settings.json: layer_bits: 'cnov1' fits none of the \d+ layers \(nearest: "
    assert re.search(message, said(result))
    assert not (tmp_path / "run").exists()
