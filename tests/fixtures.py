"""One thread, and what many tests share: a small trained classifier, its teacher, and a small bank of its samples."""

import dataclasses
import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qimera.config.settings import DirectSettings, GeneratorSettings, SynthesisSettings
from qimera.export import comparison
from qimera.pipeline import synthesize
from qimera.report import boundary
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import EMBEDDED_MODELS, load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, SMALL_INPUT
from tests.forked import Starter, loaded_process
from tests.networks import SPEC, TinyNet, toy_pixels, trained_tiny_net
from tests.shared import changed, keep, tensors_of
from tests.spared import spare

# Several threads on shared cores take longer than one, and sum in another order.
torch.set_num_threads(1)

# The type checks that a test run adds cannot be compiled; test_acceleration.py starts a program for that.
torch.compiler.set_stance("force_eager")

# Traced graphs are millions of small objects, and looking for cycles among them takes a sixth of the time.
gc.set_threshold(50_000, 20, 50)

# After an export the runtime is timed for half a second, which tells a user something and a test nothing.
comparison._TIMED_MILLISECONDS = 10.0

# As in a terminal: a shell lets programs in the background ignore Ctrl-C, and those that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The walk across a boundary in a report takes more steps than its tests need.
boundary._MOST_STEPS = 4

TINY_SYNTHESIS = SynthesisSettings(
    num_generated=48,
    num_optimized=48,
    generator=GeneratorSettings(num_steps=8, batch_size=16, base_channels=16, mapping_dim=8, precision="float32"),
    direct=DirectSettings(num_steps=20, batch_size=24, precision="float32"),  # the same samples on every machine
)


@pytest.fixture(scope="session")
def tiny_model() -> TinyNet:
    """A trained classifier as a user would bring it; no test may change it."""
    model = trained_tiny_net()
    keep("tiny_model", model.state_dict())
    return model


@pytest.fixture(scope="session")
def teacher(tiny_model: TinyNet) -> Teacher:
    """The teacher captured from ``tiny_model``."""
    teacher = Teacher.capture(tiny_model, SPEC)
    keep("teacher", tensors_of(teacher))
    return teacher


@pytest.fixture(scope="session")
def bank(teacher: Teacher) -> SampleBank:
    """A bank with samples of both producers and a generator that can draw more."""
    bank = synthesize(teacher, settings=TINY_SYNTHESIS, seed=0)
    keep("bank", tensors_of(bank))
    return bank


@pytest.fixture(scope="session")
def split_bank(bank: SampleBank) -> SampleBank:
    """The same samples, the last 32 of them held out."""
    return dataclasses.replace(bank, settings=bank.settings.model_copy(update={"num_held_out": 32}))


GOOD_DIGITS = SynthesisSettings(
    num_optimized=48, num_held_out=16, direct=DirectSettings(num_steps=40, batch_size=64, precision="float32")
)


@pytest.fixture(scope="session")
def digits_teacher() -> Teacher:
    """The teacher of the embedded classifier of digits."""
    teacher = Teacher.capture(load_model("mnist_cnn"), EMBEDDED_MODELS["mnist_cnn"].input_spec)
    keep("digits_teacher", tensors_of(teacher))
    return teacher


@pytest.fixture(scope="session")
def digits_bank(digits_teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank without warnings, of samples that resemble digits, 16 of them held out."""
    path = tmp_path_factory.mktemp("digits") / "bank"
    synthesize(digits_teacher, settings=GOOD_DIGITS).save(path)
    return path


@pytest.fixture(scope="session")
def small_teacher() -> Teacher:
    """The teacher of runs whose settings are ``tiny_settings()``."""
    teacher = Teacher.capture(load_model(SMALL), SMALL_INPUT)
    keep("small_teacher", tensors_of(teacher))
    return teacher


@pytest.fixture(scope="session")
def toy_images() -> Tensor:
    """Normalised images of the task that ``tiny_model`` was trained on, which it has not seen."""
    images = SPEC.normalize(toy_pixels(512, seed=2)[0])
    keep("toy_images", {"images": images})
    return images


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """What ``Forked`` processes are started by."""
    with loaded_process() as process:
        yield process


@pytest.fixture(scope="session", autouse=True)
def _pytorch_is_spared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        spare(patch)
        yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_shared_has_changed() -> Iterator[None]:
    yield
    assert not changed(), "a test of this file changes what others share"
