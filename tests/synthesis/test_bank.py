import dataclasses
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qimera.config.settings import GeneratorSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.pipeline import synthesize
from qimera.synthesis import bank as bank_module
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC, TinyNet


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_bank(teacher: Teacher, count: int = 20) -> SampleBank:
    images = torch.randn(count, *SPEC.shape, generator=seeded(0))
    labels = torch.randn(count, NUM_CLASSES, generator=seeded(1)).softmax(1)
    return SampleBank.from_images(images, labels, teacher, SynthesisSettings(), 7)


@pytest.fixture
def saved(bank: SampleBank, tmp_path: Path) -> Path:
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


def assert_equal(one: SampleBank, two: SampleBank) -> None:
    for field in ("pixels", "soft_labels", "logits"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field
    for field in ("input_spec", "settings", "seed", "teacher_hash"):
        assert getattr(one, field) == getattr(two, field), field


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_images_come_back_as_the_nearest_of_256_pixels(teacher: Teacher) -> None:
    images = SPEC.low + (SPEC.high - SPEC.low) * torch.rand(4, *SPEC.shape, generator=seeded(0))
    labels = torch.eye(NUM_CLASSES)[:4]
    stored = SampleBank.from_images(images, labels, teacher, SynthesisSettings(), 0).take(slice(None)).images
    # half a pixel, and rounding of the two conversions
    assert bool(((stored - images).abs() <= (SPEC.high - SPEC.low) / 255 * 0.5001).all())


def test_logits_are_the_teachers_for_the_stored_pixels(teacher: Teacher, bank: SampleBank) -> None:
    samples = bank.take(slice(None))
    with torch.no_grad():
        # rtol: another batch size takes another kernel
        torch.testing.assert_close(samples.logits, teacher(samples.images), rtol=1e-4, atol=1e-4)


def test_held_out_samples_are_the_last_and_in_no_batch(split_bank: SampleBank) -> None:
    assert split_bank.num_training == len(split_bank) - 32
    assert torch.equal(split_bank.held_out.logits, split_bank.logits[-32:])
    numbered = dataclasses.replace(split_bank, logits=torch.arange(96.0)[:, None].expand(-1, NUM_CLASSES))
    for batch_size in (1, 7, 64, 1000):
        seen = {int(i) for part in islice(numbered.batches(batch_size, seeded(0)), 300) for i in part.logits[:, 0]}
        assert seen == set(range(split_bank.num_training))


def test_a_bank_without_held_out_samples_says_so(bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="holds no held-out samples to judge students by"):
        _ = bank.held_out


def test_held_out_samples_stay_held_out_on_disk(split_bank: SampleBank, teacher: Teacher, tmp_path: Path) -> None:
    split_bank.save(tmp_path / "bank")
    loaded = SampleBank.load(tmp_path / "bank", teacher)
    assert_equal(loaded, split_bank)
    assert torch.equal(loaded.held_out.images, split_bank.held_out.images)


def test_a_bank_from_before_there_were_held_out_samples_has_none(saved: Path, teacher: Teacher) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["settings"]["num_held_out"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    bank = SampleBank.load(saved, teacher)
    assert bank.num_training == len(bank)


def test_a_bank_of_held_out_samples_alone_is_damaged(saved: Path, teacher: Teacher) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["settings"]["num_held_out"] = 96
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"damaged \(96 of 96 samples are held out\)"):
        SampleBank.load(saved, teacher)


def test_a_slice_and_an_index_take_the_same_samples(bank: SampleBank) -> None:
    one, two = bank.take(slice(2, 5)), bank.take(torch.tensor([2, 3, 4]))
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.soft_labels, two.soft_labels)
    assert torch.equal(one.logits, two.logits)


@given(batch_size=st.integers(1, 30), seed=st.integers(0, 1000))
def test_no_sample_comes_again_before_all_have_come(teacher: Teacher, batch_size: int, seed: int) -> None:
    numbered = small_bank(teacher)
    numbered = dataclasses.replace(numbered, logits=torch.arange(20.0)[:, None].expand(20, NUM_CLASSES))
    batches = islice(numbered.batches(batch_size, seeded(seed)), 60 // min(batch_size, 20))
    drawn = torch.cat([batch.logits[:, 0] for batch in batches]).long()
    for start in range(0, len(drawn) - 19, 20):
        assert drawn[start : start + 20].sort().values.tolist() == list(range(20))


def test_batches_have_the_size_asked_for_at_most_that_of_the_bank(teacher: Teacher) -> None:
    numbered = small_bank(teacher)
    assert [len(each.images) for each in islice(numbered.batches(8, seeded(0)), 6)] == [8] * 6
    assert [len(each.images) for each in islice(numbered.batches(500, seeded(0)), 2)] == [20, 20]


def test_the_order_of_batches_depends_on_the_generator_alone(bank: SampleBank) -> None:
    one, two, other = (next(bank.batches(16, seeded(seed))).images for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_bank_comes_back_as_it_was_saved(teacher: Teacher, bank: SampleBank, saved: Path) -> None:
    loaded = SampleBank.load(saved, teacher)
    assert_equal(loaded, bank)
    assert loaded.synthesizer is not None
    assert bank.synthesizer is not None
    drawn = bank.synthesizer.draw(8, seeded(0))
    with torch.no_grad():
        assert torch.equal(loaded.synthesizer(drawn)[0], bank.synthesizer(drawn)[0])


def test_random_embeddings_come_back_with_the_noise_that_they_were_trained_with(
    teacher: Teacher, tmp_path: Path
) -> None:
    generator = GeneratorSettings(extracted_embeddings=False, embedding_dim=4, num_steps=0)
    settings = SynthesisSettings(num_generated=4, num_optimized=0, generator=generator)
    bank = synthesize(teacher, settings=settings, seed=3)
    bank.save(tmp_path / "bank")
    made, loaded = bank.synthesizer, SampleBank.load(tmp_path / "bank", teacher).synthesizer
    assert made is not None
    assert loaded is not None
    drawn = made.draw(4, seeded(0))
    with torch.no_grad():
        assert torch.equal(loaded(drawn)[0], made(drawn)[0])


def test_a_bank_of_several_shards_comes_back_in_order(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "_SHARD_BYTES", 7 * 3 * 16 * 16)
    bank = small_bank(teacher)
    bank.save(str(tmp_path / "bank"))  # any path may be a string
    assert len(list((tmp_path / "bank").glob("samples-*.safetensors"))) == 3
    loaded = SampleBank.load(str(tmp_path / "bank"), teacher)
    assert_equal(loaded, bank)
    assert loaded.synthesizer is None


def test_the_manifest_says_what_the_bank_was_made_from(teacher: Teacher, bank: SampleBank, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["teacher"] == teacher.hash
    assert manifest["num_samples"] == len(bank) == 96
    assert manifest["settings"]["labels"]["superposition"] is True
    assert manifest["input"]["shape"] == [3, 16, 16]


def test_a_bank_is_never_written_over(bank: SampleBank, saved: Path) -> None:
    before = sorted(saved.iterdir())
    with pytest.raises(ConfigError, match="exists already; choose another place"):
        bank.save(saved)
    assert sorted(saved.iterdir()) == before


def test_nothing_is_left_behind_when_writing_fails(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(bank_module, "save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        small_bank(teacher).save(tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(teacher: Teacher, tmp_path: Path) -> None:
    """In a container, a process that is started again often has the number that it had before."""
    (tmp_path / f".bank.partial-{os.getpid()}").mkdir()
    small_bank(teacher).save(tmp_path / "bank")
    assert len(SampleBank.load(tmp_path / "bank", teacher)) == 20


def test_a_bank_of_another_teacher_is_refused(saved: Path) -> None:
    torch.manual_seed(5)
    other = Teacher.capture(TinyNet(), SPEC)
    with pytest.raises(ConfigError, match=f"made for another teacher.*this model has {other.hash[:12]}"):
        SampleBank.load(saved, other)


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_shard(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "samples-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def halve_generator(directory: Path) -> None:
    path = directory / "generator.safetensors"
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut off": (lambda d: (d / "manifest.json").write_text('{"format_version": 1, '), "damaged"),
    "manifest not an object": (lambda d: (d / "manifest.json").write_text("[]"), "damaged"),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing; is this a bank"),
    "no seed": (lambda d: change_manifest(d, lambda m: m.pop("seed")), "damaged .*seed"),
    "no shards": (lambda d: change_manifest(d, lambda m: m.update(shards=[])), "damaged"),
    "shards of no list": (lambda d: change_manifest(d, lambda m: m.update(shards=3)), "damaged"),
    "fewer samples than written": (
        lambda d: change_manifest(d, lambda m: m.update(num_samples=97)),
        r"manifest.json names 97 samples, its shards hold 96; copy the whole bank again",
    ),
    "no number of samples": (lambda d: change_manifest(d, lambda m: m.pop("num_samples")), "damaged .*num_samples"),
    "unknown setting": (lambda d: change_manifest(d, lambda m: m["settings"].update(colour=1)), "colour"),
    "wrong setting": (lambda d: change_manifest(d, lambda m: m["settings"].update(num_generated=-1)), "num_generated"),
    "other normalisation": (
        lambda d: change_manifest(d, lambda m: m["input"].update(mean=[0, 0, 0])),
        "made for images of",
    ),
    "no settings": (lambda d: change_manifest(d, lambda m: m.update(settings=3)), "damaged"),
    "images of no number": (
        lambda d: change_manifest(d, lambda m: m.update(images={"count": 0, "sha256": "ab", "kept": False})),
        "count: .* given 0",
    ),
    "images of no record": (lambda d: change_manifest(d, lambda m: m.update(images=[3])), "damaged"),
    "later format": (lambda d: change_manifest(d, lambda m: m.update(format_version=99)), "format version 99"),
    "shard missing": (lambda d: (d / "samples-00000.safetensors").unlink(), "is missing"),
    "shard cut off": (lambda d: cut(d / "samples-00000.safetensors"), "damaged"),
    "no logits": (lambda d: change_shard(d, lambda t: t.pop("logits")), "damaged .*logits"),
    "other image size": (
        lambda d: change_shard(d, lambda t: t.update(pixels=t["pixels"][:, :, 1:].clone())),
        "expected shapes",
    ),
    "other classes": (
        lambda d: change_shard(d, lambda t: t.update(logits=t["logits"][:, 1:].clone())),
        "expected shapes",
    ),
    "floating pixels": (
        lambda d: change_shard(d, lambda t: t.update(pixels=t["pixels"].float())),
        r"samples-00000.safetensors: damaged \(pixels is of type torch.float32, and torch.uint8 was written\)",
    ),
    "soft labels of double precision": (
        lambda d: change_shard(d, lambda t: t.update(soft_labels=t["soft_labels"].double())),
        r"samples-00000.safetensors: damaged \(soft_labels is of type torch.float64, and torch.float32 was written\)",
    ),
    "whole logits": (
        lambda d: change_shard(d, lambda t: t.update(logits=t["logits"].long())),
        r"samples-00000.safetensors: damaged \(logits is of type torch.int64, and torch.float32 was written\)",
    ),
    "a generator of half precision": (halve_generator, r"generator.safetensors: damaged \(.* is of type torch.float16"),
    "generator cut off": (lambda d: cut(d / "generator.safetensors"), "generator.safetensors: damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bank_is_refused_with_what_is_wrong(teacher: Teacher, saved: Path, damage: str) -> None:
    inflict, message = DAMAGE[damage]
    inflict(saved)
    with pytest.raises(ConfigError, match=message) as refusal:
        SampleBank.load(saved, teacher)
    assert str(saved) in str(refusal.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/../../outside.safetensors", "/{}/outside.safetensors"])
def test_a_manifest_cannot_name_files_outside_of_the_bank(teacher: Teacher, saved: Path, name: str) -> None:
    outside = saved.parent / "outside.safetensors"
    (saved / "samples-00000.safetensors").rename(outside)
    change_manifest(saved, lambda m: m.update(shards=[name.format(saved.parent)]))
    with pytest.raises(ConfigError, match="a shard lies outside of the directory"):
        SampleBank.load(saved, teacher)


def test_a_manifest_cannot_name_a_shard_twice(teacher: Teacher, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["shards"] *= 2
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="a shard is named twice"):
        SampleBank.load(saved, teacher)


def test_an_empty_directory_is_no_bank(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is this a bank"):
        SampleBank.load(tmp_path, teacher)


def test_the_hash_is_that_of_pixels_and_labels_in_any_layout_and_copies_neither(bank: SampleBank) -> None:
    expected = hashlib.sha256(bytes(bank.pixels.flatten().tolist()) + bank.soft_labels.numpy().tobytes()).hexdigest()
    tracemalloc.start()
    found = bank.hash
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == expected
    assert peak < bank.pixels.numel() / 2
    assert dataclasses.replace(bank, pixels=bank.pixels.contiguous(memory_format=torch.channels_last)).hash == expected
