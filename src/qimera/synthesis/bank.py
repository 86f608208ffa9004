"""The sample bank: images, soft labels and teacher logits, made once per teacher and used for every bit width.

GDFQ and Qimera train a generator anew for every bit width (deviation D17).
"""

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qimera.config.given_images import GivenImages, checked_pixels, digests_of
from qimera.config.input_spec import InputSpec
from qimera.config.settings import SynthesisSettings
from qimera.errors import ConfigError
from qimera.machine.files import check_types, make_folder, naming, save_tensors, sync_directory, sync_tree
from qimera.machine.seeds import Stream, generator_for
from qimera.synthesis.samples import Batches, Samples
from qimera.synthesis.synthesizer import Synthesizer
from qimera.teacher.teacher import Teacher, as_teacher

FORMAT_VERSION = 1
_SHARD_BYTES = 64 << 20
_TYPES = {"pixels": torch.uint8, "soft_labels": torch.float32, "logits": torch.float32}


@dataclass(frozen=True)
class SampleBank:
    """Synthetic samples of one teacher, as 8-bit pixels, and the synthesizer that can draw more.

    The last ``settings.num_held_out`` samples are held out: ``batches`` never yields them. Images of the user's, if
    there are any, stand before those.
    """

    pixels: UInt8[Tensor, "sample channel height width"]
    soft_labels: Float[Tensor, "sample num_classes"]
    logits: Float[Tensor, "sample num_classes"]
    input_spec: InputSpec
    settings: SynthesisSettings
    seed: int
    teacher_hash: str
    synthesizer: Synthesizer | None = None
    """The trained generator, when the settings train one."""
    images: GivenImages | None = None
    """What is remembered of the user's images that joined; None where none did."""
    num_images: int = 0
    """Images of the user's that the bank holds; 0 too where it remembers them alone."""

    @classmethod
    def from_images(
        cls,
        images: Float[Tensor, "sample channel height width"],
        soft_labels: Float[Tensor, "sample num_classes"],
        teacher: Teacher,
        settings: SynthesisSettings,
        seed: int,
        synthesizer: Synthesizer | None = None,
    ) -> "SampleBank":
        """Round normalised images to pixels and ask the teacher what it makes of them."""
        pixels = teacher.input_spec.to_pixels(images).contiguous()
        return cls.from_pixels(pixels, soft_labels, teacher, settings, seed, synthesizer)

    @classmethod
    def from_pixels(
        cls,
        pixels: UInt8[Tensor, "sample channel height width"],
        soft_labels: Float[Tensor, "sample num_classes"],
        teacher: Teacher,
        settings: SynthesisSettings,
        seed: int,
        synthesizer: Synthesizer | None = None,
    ) -> "SampleBank":
        """Ask the teacher what it makes of these pixels."""
        logits = _answers(pixels, teacher)
        return cls(pixels, soft_labels.float(), logits, teacher.input_spec, settings, seed, teacher.hash, synthesizer)

    def with_images(
        self, pixels: Shaped[Tensor, "image channel height width"], teacher: Teacher, *, keep: bool = False
    ) -> "SampleBank":
        """Return a bank in which unlabelled images of the user's join the samples that students learn from.

        Their soft labels are the teacher's own answers. They are never held out. A bank that holds these images
        already is returned as it is.

        Args:
            pixels: Of type ``torch.uint8``, 0 darkest and 255 brightest, on any device; ``load_images`` reads them.
            teacher: That of the bank.
            keep: Whether ``save`` writes the images too; without it, a bank on disk remembers their hash alone.

        Raises:
            ConfigError: there are none, they are of another shape or type, the bank has other images, or another
                teacher.
        """
        check_teacher(self, teacher)
        pixels = checked_pixels(pixels, self.input_spec)
        digests = digests_of(pixels)
        given = GivenImages.of_digests(digests, kept=keep)
        if self.images is not None and self.images.sha256 != given.sha256:
            raise ConfigError(f"images: the bank was made with {self.images.text()}, given {given.text()}")
        remembered = given if keep or self.images is None else self.images
        if self.num_images:
            return replace(self, images=remembered)
        pixels = pixels[sorted(range(len(pixels)), key=lambda index: digests[index])]
        logits = _answers(pixels, teacher)
        before, after = slice(self.num_training), slice(self.num_training, None)
        return replace(
            self,
            pixels=torch.cat([self.pixels[before], pixels, self.pixels[after]]),
            soft_labels=torch.cat([self.soft_labels[before], logits.softmax(1), self.soft_labels[after]]),
            logits=torch.cat([self.logits[before], logits, self.logits[after]]),
            images=remembered,
            num_images=len(pixels),
        )

    @property
    def synthetic(self) -> "SampleBank":
        """The bank without the user's images, which it goes on to remember."""
        if not self.num_images:
            return self
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.num_training - self.num_images : self.num_training] = False
        pixels, soft_labels, logits = (each[kept] for each in (self.pixels, self.soft_labels, self.logits))
        return replace(self, pixels=pixels, soft_labels=soft_labels, logits=logits, num_images=0)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_training(self) -> int:
        """Samples that students may learn from, the user's images among them; they come first."""
        return len(self) - self.settings.num_held_out

    @property
    def held_out(self) -> Samples:
        """The samples that no student learns from.

        Raises:
            ConfigError: the bank has none.
        """
        if not self.settings.num_held_out:
            raise ConfigError(
                "bank: holds no held-out samples to judge students by; synthesise one with num_held_out of 1 or more"
            )
        return self.take(slice(self.num_training, None))

    def take(self, index: Int[Tensor, " batch"] | slice) -> Samples:
        """Return the samples at these positions."""
        return Samples(self.input_spec.normalize(self.pixels[index]), self.soft_labels[index], self.logits[index])

    def batches(self, batch_size: int, rng: torch.Generator) -> "Batches":
        """Yield batches without end, each training sample once before any comes again, in random order."""
        return Batches(self.take, self.num_training, min(batch_size, self.num_training), rng)

    @property
    def hash(self) -> str:
        """SHA-256 over pixels and soft labels."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy().data)  # not copied, and not kept: tensors can change
        digest.update(self.soft_labels.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write shards, generator and manifest; the directory appears complete or not at all.

        Images of the user's are written only if they are to be kept; else the manifest remembers their hash.

        Raises:
            ConfigError: it exists already.
        """
        directory = Path(directory)
        if directory.exists():
            raise ConfigError(f"bank {directory}: exists already; choose another place or remove it")
        make_folder(directory.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
        whole = partial / directory.name  # not the temporary folder itself, which nobody else may read
        try:
            with naming(directory):
                whole.mkdir()
                (self if self.images and self.images.kept else self.synthetic)._write(whole)
                sync_tree(whole)  # before what it was made from is removed
                whole.rename(directory)
                sync_directory(directory.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, directory: Path) -> None:
        per_shard = max(1, _SHARD_BYTES // math.prod(self.input_spec.shape))
        shards = []
        for number, start in enumerate(range(0, max(1, len(self)), per_shard)):
            part = slice(start, start + per_shard)
            shards.append(f"samples-{number:05}.safetensors")
            tensors = {"pixels": self.pixels[part], "soft_labels": self.soft_labels[part], "logits": self.logits[part]}
            save_tensors(tensors, directory / shards[-1])
        if self.synthesizer is not None:
            save_tensors(self.synthesizer.state_dict(), directory / "generator.safetensors")
        manifest = {
            "format_version": FORMAT_VERSION,
            "teacher": self.teacher_hash,
            "seed": self.seed,
            "num_samples": len(self),
            "shards": shards,
            "input": self.input_spec.model_dump(),
            "settings": self.settings.model_dump(),
            "images": self.images and self.images.model_dump(),
        }
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path | str, teacher: nn.Module) -> "SampleBank":
        """Read a bank that ``save`` wrote for this teacher, given as such or as the model.

        Raises:
            ConfigError: no bank there, a damaged one, or one of another teacher.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
            version, owner, seed = manifest["format_version"], manifest["teacher"], manifest["seed"]
            if type(seed) is not int or seed < 0:
                raise TypeError(f"seed is {seed!r:.50}")
            if version != FORMAT_VERSION:
                raise ConfigError(f"bank {directory}: format version {version}, this qimera reads {FORMAT_VERSION}")
            settings, input_spec, images = _read_settings(directory, manifest)
            teacher = as_teacher(teacher, input_spec)
            if owner != teacher.hash:
                raise ConfigError(
                    f"bank {directory}: made for another teacher (hash {owner[:12]}, this model has "
                    f"{teacher.hash[:12]}); synthesise a bank for this model and its weights"
                )
            if input_spec != teacher.input_spec:
                raise ConfigError(
                    f"bank {directory}: made for images of {input_spec}, this teacher takes {teacher.input_spec}"
                )
            names = [str(name) for name in manifest["shards"]]
            if any(Path(name).name != name for name in names):
                raise ConfigError(f"bank {directory}: a shard lies outside of the directory: {names}")
            if len(set(names)) < len(names):
                raise ConfigError(f"bank {directory}: damaged (a shard is named twice: {names}); synthesise it again")
            shards = [_read_shard(directory / name) for name in names]
            parts = [torch.cat([shard[key] for shard in shards]) for key in _TYPES]
            if manifest["num_samples"] != len(parts[0]):
                raise ConfigError(
                    f"bank {directory}: manifest.json names {manifest['num_samples']!r:.50} samples, its shards hold "
                    f"{len(parts[0])}; copy the whole bank again, or synthesise it again"
                )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"bank {directory}: {error.filename or 'a file'} is missing; is this a bank?") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
            raise ConfigError(f"bank {directory}: damaged ({error}); synthesise it again") from error
        _check_shapes(directory, parts, teacher)
        num_images = images.count if images and images.kept else 0
        if settings.num_held_out + num_images + (images is None) > len(parts[0]):
            raise ConfigError(
                f"bank {directory}: damaged ({settings.num_held_out} of {len(parts[0])} samples are held out"
                + (f", and {num_images} are images of yours" if num_images else "")
                + "); synthesise it again"
            )
        synthesizer = _load_synthesizer(directory / "generator.safetensors", teacher, settings, seed)
        spec = teacher.input_spec
        return cls(parts[0], parts[1], parts[2], spec, settings, seed, owner, synthesizer, images, num_images)


def _read_settings(
    directory: Path, manifest: dict[str, object]
) -> tuple[SynthesisSettings, InputSpec, GivenImages | None]:
    given = manifest.get("images")  # banks of qimera 0.2.0 have no such key
    try:
        return (
            SynthesisSettings.model_validate(manifest["settings"]),
            InputSpec.model_validate(manifest["input"]),
            None if given is None else GivenImages.model_validate(given),
        )
    except ConfigError as error:
        raise ConfigError(f"bank {directory}: {error}") from error


def _read_shard(path: Path) -> dict[str, Tensor]:
    tensors = load_file(path)
    check_types(path, tensors, _TYPES)
    return tensors


def _answers(
    pixels: UInt8[Tensor, "sample channel height width"], teacher: Teacher
) -> Float[Tensor, "sample num_classes"]:
    if not len(pixels):
        return torch.empty(0, teacher.num_classes)
    with torch.no_grad():
        normalized = (teacher.input_spec.normalize(part).to(teacher.device) for part in pixels.split(64))
        return torch.cat([teacher(images).cpu() for images in normalized])


def _check_shapes(directory: Path, parts: list[Tensor], teacher: Teacher) -> None:
    count, classes = len(parts[0]), teacher.num_classes
    expected = [(count, *teacher.input_spec.shape), (count, classes), (count, classes)]
    found = [tuple(part.shape) for part in parts]
    if found != expected:
        raise ConfigError(f"bank {directory}: expected shapes {expected}, found {found}")


def _load_synthesizer(path: Path, teacher: Teacher, settings: SynthesisSettings, seed: int) -> Synthesizer | None:
    if not path.exists():
        return None
    # as it began its training, for the scale of its noise is that of its first embeddings
    synthesizer = Synthesizer(teacher, settings, generator_for(seed, Stream.GENERATOR))
    try:
        tensors = load_file(path)
        check_types(path, tensors, {name: value.dtype for name, value in synthesizer.state_dict().items()})
        synthesizer.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); synthesise the bank again") from error
    return synthesizer.eval()


def check_bank(bank: SampleBank, teacher: Teacher) -> None:
    """Raise ConfigError if no student of ``teacher`` can learn from ``bank``."""
    check_teacher(bank, teacher)
    if bank.images is not None and not bank.num_images:
        raise ConfigError(
            f"images: the bank was made with {bank.images.text()}, and does not hold them; give them again (--images, "
            "or bank.with_images in Python)"
        )
    if not bank.num_training:
        raise ConfigError(NOTHING_TO_LEARN_FROM)


NOTHING_TO_LEARN_FROM = (
    "num_generated and num_optimized: both are 0, and there are no images of yours, so there is nothing to make a "
    "student from; give --images, or one of them above 0"
)


def check_teacher(bank: SampleBank, teacher: Teacher) -> None:
    """Raise ConfigError if ``bank`` is of another teacher, or of images of another kind."""
    if bank.teacher_hash != teacher.hash:
        raise ConfigError(
            f"bank: made for another teacher (hash {bank.teacher_hash[:12]}, this model has {teacher.hash[:12]}); "
            "synthesise a bank for this model and its weights"
        )
    if bank.input_spec != teacher.input_spec:
        raise ConfigError(f"bank: made for images of {bank.input_spec}, this teacher takes {teacher.input_spec}")
