import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from torch import Tensor

from qimera.errors import ConfigError
from qimera.export.other_quantizers import calibration_batches, data_loader, nncf_dataset, onnxruntime_reader
from qimera.synthesis.bank import SampleBank
from tests.networks import NUM_CLASSES, TinyNet


def chosen(bank: SampleBank) -> list[int]:
    """Written out again: training samples of one class."""
    return [index for index in range(bank.num_training) if float(bank.soft_labels[index].max()) > 0.999]


def test_batches_hold_the_training_samples_of_one_class_once_and_in_order(split_bank: SampleBank) -> None:
    found = list(calibration_batches(split_bank, 5))
    wanted = chosen(split_bank)
    assert 5 < len(wanted) < split_bank.num_training
    assert all(len(batch) == 5 for batch in found[:-1])
    np.testing.assert_array_equal(np.concatenate(found), split_bank.take(torch.tensor(wanted)).images.numpy())
    assert found[0].dtype == np.float32


def test_where_all_are_superposed_all_are_used(bank: SampleBank) -> None:
    mixed = dataclasses.replace(bank, soft_labels=torch.full_like(bank.soft_labels, 1 / NUM_CLASSES))
    assert sum(map(len, calibration_batches(mixed))) == bank.num_training


def test_the_reader_can_be_read_again(bank: SampleBank) -> None:
    reader = onnxruntime_reader(bank, "pixels", batch_size=8, num_samples=10)
    for _ in range(2):
        batches = list(iter(reader.get_next, None))
        assert [each["pixels"].shape[0] for each in batches] == [8, 2]
        reader.rewind()


def test_onnx_runtime_quantizes_a_model_with_samples_as_well_as_with_real_images(
    tmp_path: Path, tiny_model: TinyNet, bank: SampleBank, toy_images: Tensor
) -> None:
    program = torch.onnx.export(tiny_model, (toy_images[:1],), dynamo=True, input_names=["images"], verbose=False)
    assert program is not None
    onnx.save(program.model_proto, tmp_path / "float.onnx")
    reader = onnxruntime_reader(bank, "images")
    options = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", reader, per_channel=True, **options)
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    found = np.concatenate([session.run(None, {"images": each.numpy()})[0] for each in toy_images.split(1)])
    with torch.no_grad():
        wanted = tiny_model(toy_images).argmax(1).numpy()
    assert float((found.argmax(1) == wanted).mean()) > 0.97


def test_the_loader_gives_images_and_classes(bank: SampleBank) -> None:
    images, labels = next(iter(data_loader(bank, 8)))
    first = torch.tensor(chosen(bank)[:8])
    assert torch.equal(images, bank.take(first).images)
    assert torch.equal(labels, bank.soft_labels[first].argmax(1))
    assert sum(len(batch) for batch, _ in data_loader(bank, 7, num_samples=10)) == 10


def test_nncf_gets_its_own_data_set(bank: SampleBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface alone: NNCF pins other versions than the tests have."""
    nncf = ModuleType("nncf")
    nncf.Dataset = lambda batches, transform: (batches, transform)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nncf", nncf)
    batches, transform = nncf_dataset(bank, "images", 5)
    assert len(batches) == 5
    assert transform(batches[0])["images"] is batches[0]
    assert nncf_dataset(bank)[1] is None


def test_without_nncf_it_says_so(bank: SampleBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ConfigError, match=r"NNCF cannot be imported .*pip install nncf"):
        nncf_dataset(bank)


@pytest.mark.parametrize(("arguments", "message"), [((0, 5), "batch_size"), ((1, 0), "num_samples")])
def test_no_image_at_all_is_refused(bank: SampleBank, arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}: must be 1 or more, given 0"):
        next(calibration_batches(bank, *arguments))
    with pytest.raises(ConfigError, match=message):
        onnxruntime_reader(bank, "images", *arguments)
