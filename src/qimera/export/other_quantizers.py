"""A bank as calibration data for other quantizers: ONNX Runtime, NNCF and OpenVINO, or whatever takes a DataLoader.

They then need no real images either. They get the samples of one class, which are most like real images; superposed
ones reach other values (MobileNetV1, ONNX Runtime W8A8, 600 images: 66.0 % top-1 from 50 superposed samples, 75.3 %
from 78 others, 75.7 % from 100 real images). None of these tools is imported before it is asked for.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qimera.errors import ConfigError
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.superposition import shows_one_class

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader


def calibration_batches(
    bank: SampleBank, batch_size: int = 1, num_samples: int | None = None
) -> Iterator[Float[np.ndarray, "batch channel height width"]]:
    """Yield normalised float32 images of ``bank`` in their order, held-out and superposed samples left out.

    Args:
        bank: From ``qimera.synthesize``, or loaded.
        batch_size: Images at a time.
        num_samples: How many samples to give, the first ones; all if None.

    Raises:
        ConfigError: fewer than one image at a time, or in all.
    """
    for chosen in _chosen(bank, batch_size, num_samples).split(batch_size):
        yield bank.take(chosen).images.numpy()


def onnxruntime_reader(
    bank: SampleBank, input_name: str, batch_size: int = 1, num_samples: int | None = None
) -> "CalibrationDataReader":
    """Return what ``onnxruntime.quantization.quantize_static`` takes as its calibration data.

    Args:
        bank: Samples of the model that is to be quantized.
        input_name: Of the ONNX model's input, which takes normalised images.
        batch_size: Images at a time.
        num_samples: How many samples to give, the first ones; all if None.

    Raises:
        ConfigError: fewer than one image at a time, or in all.
    """
    from onnxruntime.quantization import CalibrationDataReader

    _chosen(bank, batch_size, num_samples)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {input_name: batch}

        def rewind(self) -> None:
            self._batches = calibration_batches(bank, batch_size, num_samples)

    return Reader()


def nncf_dataset(bank: SampleBank, input_name: str | None = None, num_samples: int | None = None) -> Any:
    """Return the ``nncf.Dataset`` that ``nncf.quantize`` takes, for OpenVINO, ONNX or PyTorch models.

    Args:
        bank: Samples of the model that is to be quantized.
        input_name: Of the input, where the model takes a dictionary (ONNX); else images are passed alone.
        num_samples: How many samples to give, the first ones; all if None.

    Raises:
        ConfigError: NNCF is not installed, or there is to be no image at all.
    """
    _chosen(bank, 1, num_samples)
    try:
        import nncf
    except ImportError as error:
        raise ConfigError(f"nncf_dataset: NNCF cannot be imported ({error}); pip install nncf") from error
    batches = list(calibration_batches(bank, 1, num_samples))
    return nncf.Dataset(batches, None if input_name is None else lambda batch: {input_name: batch})


def data_loader(
    bank: SampleBank, batch_size: int = 32, num_samples: int | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a DataLoader of (normalised images, the class of each one's largest share).

    Raises:
        ConfigError: fewer than one image at a time, or in all.
    """
    samples = bank.take(_chosen(bank, batch_size, num_samples))
    return DataLoader(TensorDataset(samples.images, samples.soft_labels.argmax(1)), batch_size)


def _chosen(bank: SampleBank, batch_size: int, num_samples: int | None) -> Int[Tensor, " chosen"]:
    """Return the positions of the samples to be used."""
    for name, value in (("batch_size", batch_size), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: must be 1 or more, given {value}")
    single = shows_one_class(bank.soft_labels[: bank.num_training])
    single[bank.num_training - bank.num_images :] = True
    return (single if bool(single.any()) else ~single).nonzero().flatten()[:num_samples]
