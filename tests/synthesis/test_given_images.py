import inspect
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qimera.config.given_images import GivenImages
from qimera.config.settings import DirectSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.export.other_quantizers import calibration_batches
from qimera.machine.progress import Progress
from qimera.pipeline import quantize, synthesize
from qimera.synthesis.bank import SampleBank, check_bank
from qimera.synthesis.formats import write_bank
from qimera.synthesis.parts import needs_generator, optimizes, parts_of
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, toy_pixels

NOTHING = SynthesisSettings(num_optimized=0)
FEW = SynthesisSettings(num_optimized=8, direct=DirectSettings(num_steps=2, batch_size=8, precision="float32"))


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Ten images of the user's."""
    return toy_pixels(10, seed=5)[0]


@pytest.fixture(scope="module")
def joined(split_bank: SampleBank, photographs: Tensor, teacher: Teacher) -> SampleBank:
    """Of 64 samples for students and 32 held out, with ten images of the user's."""
    return split_bank.with_images(photographs, teacher)


def rows(pixels: Tensor) -> set[bytes]:
    return {image.contiguous().numpy().tobytes() for image in pixels}


def test_images_join_what_students_learn_from_and_nothing_that_is_held_out(
    joined: SampleBank, split_bank: SampleBank, photographs: Tensor
) -> None:
    assert (joined.num_training, joined.num_images, len(joined)) == (74, 10, 106)
    assert torch.equal(joined.held_out.images, split_bank.held_out.images)
    drawn = torch.cat([SPEC.to_pixels(each.images) for each in islice(joined.batches(37, torch.Generator()), 2)])
    assert rows(photographs) <= rows(drawn)
    assert torch.equal(joined.pixels[:64], split_bank.pixels[:64])


def test_the_labels_of_images_are_the_teachers_own_answers(joined: SampleBank, teacher: Teacher) -> None:
    given = joined.take(slice(64, 74))
    with torch.no_grad():
        torch.testing.assert_close(given.soft_labels, teacher(given.images).softmax(1))


def test_images_that_are_no_pixels_are_refused(split_bank: SampleBank, photographs: Tensor, teacher: Teacher) -> None:
    with pytest.raises(ConfigError, match=r"images: expected pixels from 0 to 255 .*given torch.float32"):
        split_bank.with_images(photographs / 255, teacher)


def test_arrays_of_numpy_are_refused_with_what_to_give_before_any_sample_is_made(
    split_bank: SampleBank, photographs: Tensor, teacher: Teacher
) -> None:
    pixels, message = photographs.permute(0, 2, 3, 1).numpy(), r"given ndarray; .* torch.from_numpy\(images\).permute"
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(SampleBank.with_images)(split_bank, pixels, teacher)  # type-checked in tests, and nowhere else

    def fail(progress: Progress) -> None:
        pytest.fail("made a sample")

    for given, reason in ((pixels, message), (photographs[:, :, 1:], r"given \(10, 3, 15, 16\)")):
        with pytest.raises(ConfigError, match=reason):
            inspect.unwrap(synthesize)(teacher, settings=FEW, images=given, progress=fail)


def test_images_are_the_same_in_any_order_and_others_are_not(
    split_bank: SampleBank, photographs: Tensor, teacher: Teacher, joined: SampleBank
) -> None:
    turned = split_bank.with_images(photographs.flip(0), teacher)
    assert torch.equal(turned.pixels, joined.pixels)
    assert turned.images == joined.images
    changed = photographs.clone()
    changed[0, 0, 0, 0] ^= 1
    assert GivenImages.of(changed) != GivenImages.of(photographs)


def test_the_synthetic_part_is_the_bank_that_the_images_joined(joined: SampleBank, split_bank: SampleBank) -> None:
    for name in ("pixels", "soft_labels", "logits"):
        assert torch.equal(getattr(joined.synthetic, name), getattr(split_bank, name))
    assert joined.synthetic.images == joined.images
    assert joined.synthetic.num_images == 0


def test_a_bank_on_disk_remembers_a_hash_and_not_the_images(
    joined: SampleBank, split_bank: SampleBank, photographs: Tensor, teacher: Teacher, tmp_path: Path
) -> None:
    joined.save(tmp_path / "bank")
    loaded = SampleBank.load(tmp_path / "bank", teacher)
    assert loaded.hash == split_bank.hash
    assert loaded.images == GivenImages.of(photographs)
    with pytest.raises(ConfigError, match=r"made with 10 images of yours \(SHA-256 .*give them again \(--images, or"):
        check_bank(loaded, teacher)
    again = loaded.with_images(photographs, teacher)
    assert again.hash == joined.hash
    assert torch.equal(again.logits, joined.logits)
    check_bank(again, teacher)


def test_a_bank_that_keeps_images_holds_them_on_disk(
    split_bank: SampleBank, photographs: Tensor, teacher: Teacher, tmp_path: Path
) -> None:
    kept = split_bank.with_images(photographs, teacher, keep=True)
    kept.save(tmp_path / "bank")
    loaded = SampleBank.load(tmp_path / "bank", teacher)
    assert (loaded.hash, loaded.num_images) == (kept.hash, 10)
    assert loaded.with_images(photographs, teacher).hash == kept.hash  # not a second time


@pytest.mark.parametrize("form", ["npz", "safetensors", "imagefolder"])
def test_files_for_other_tools_hold_images_only_if_they_are_to_be_kept(
    joined: SampleBank, split_bank: SampleBank, photographs: Tensor, teacher: Teacher, tmp_path: Path, form: str
) -> None:
    kept = split_bank.with_images(photographs, teacher, keep=True)
    for bank, count in ((joined, 96), (kept, 106)):
        path = tmp_path / f"{count}"
        write_bank(bank, path, form)
        if form == "imagefolder":
            assert len(list(path.glob("*/*.png"))) == count
        elif form == "npz":
            assert len(np.load(path)["images"]) == count


def test_a_manifest_that_claims_images_which_are_not_there_is_damaged(
    joined: SampleBank, teacher: Teacher, tmp_path: Path
) -> None:
    joined.save(tmp_path / "bank")
    path = tmp_path / "bank" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["images"].update(kept=True, count=90)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"damaged.*90 are images of yours"):
        SampleBank.load(tmp_path / "bank", teacher)


def test_other_images_and_images_of_another_shape_are_refused(
    joined: SampleBank, photographs: Tensor, teacher: Teacher
) -> None:
    with pytest.raises(ConfigError, match=r"made with 10 images of yours .* given 9 images of yours"):
        joined.synthetic.with_images(photographs[1:], teacher)
    with pytest.raises(ConfigError, match=r"expected one or more of shape \(3, 16, 16\), given \(10, 3, 15, 16\)"):
        joined.with_images(photographs[:, :, 1:], teacher)
    with pytest.raises(ConfigError, match="one or more"):
        joined.with_images(photographs[:0], teacher)


def test_a_single_image_is_called_one() -> None:
    assert GivenImages.of(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)).text().startswith("1 image of yours")


def test_images_serve_other_quantizers_too(joined: SampleBank, photographs: Tensor) -> None:
    given = torch.cat([SPEC.to_pixels(torch.tensor(batch)) for batch in calibration_batches(joined, 16)])
    assert rows(photographs) <= rows(given)


# --- images alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 10])
def test_a_student_is_made_from_images_alone(photographs: Tensor, teacher: Teacher, tmp_path: Path, count: int) -> None:
    bank = synthesize(teacher, settings=NOTHING, images=photographs[:count])
    assert (len(bank), bank.num_training, bank.num_images) == (count, count, count)
    student = quantize(teacher, bank, "w4a4", recipe="ptq")
    with torch.no_grad():
        assert student(SPEC.normalize(photographs)).isfinite().all()
    bank.save(tmp_path / "bank")
    assert len(SampleBank.load(tmp_path / "bank", teacher)) == 0


def test_images_may_be_named_by_their_path(photographs: Tensor, teacher: Teacher, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", photographs.permute(0, 2, 3, 1).numpy())
    one = synthesize(teacher, settings=NOTHING, images=tmp_path / "images.npy")
    two = synthesize(teacher, settings=NOTHING, images=photographs)
    assert one.hash == two.hash


def test_without_samples_and_images_there_is_nothing_to_make_a_student_from(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="both are 0, and there are no images of yours"):
        synthesize(teacher, settings=NOTHING)
    with pytest.raises(ConfigError, match="give --images, or one of them above 0"):
        synthesize(teacher, recipe="images", images=None)
    empty = replace(bank, pixels=bank.pixels[:0], soft_labels=bank.soft_labels[:0], logits=bank.logits[:0])
    with pytest.raises(ConfigError, match="nothing to make a student from"):
        check_bank(empty, teacher)


def test_held_out_samples_are_synthetic_beside_images_alone(photographs: Tensor, teacher: Teacher) -> None:
    settings = SynthesisSettings(
        num_optimized=0, num_held_out=8, direct=DirectSettings(num_steps=2, batch_size=8, precision="float32")
    )
    bank = synthesize(teacher, settings=settings, images=photographs)
    assert (bank.num_training, len(bank)) == (10, 18)
    assert not rows(bank.pixels[-8:]) & rows(photographs)
    assert optimizes(settings)
    assert [part.is_optimized for part in parts_of(settings, 4, torch.Generator())] == [True]


def test_a_generator_is_trained_only_where_a_sample_needs_it() -> None:
    started = DirectSettings(start="generator")
    assert not needs_generator(SynthesisSettings(num_optimized=0, direct=started))
    assert needs_generator(SynthesisSettings(num_optimized=0, num_held_out=2, direct=started))
    assert needs_generator(SynthesisSettings(num_optimized=2, direct=started))
    assert not needs_generator(SynthesisSettings(num_optimized=2))
    assert needs_generator(SynthesisSettings(num_generated=2, num_optimized=0))
