"""The sample bank: images, soft labels and teacher logits, made once per teacher and used for every bit width.

GDFQ and Qimera train a generator anew for every bit width (deviation D17).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qimera.config.input_spec import InputSpec
from qimera.config.settings import SynthesisSettings
from qimera.errors import ConfigError
from qimera.machine.files import naming, save_tensors, sync_directory, sync_tree
from qimera.synthesis.synthesizer import Synthesizer
from qimera.teacher.teacher import Teacher

FORMAT_VERSION = 1
_SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class Samples:
    """Some samples of a bank."""

    images: Float[Tensor, "batch channel height width"]
    """Normalised."""
    soft_labels: Float[Tensor, "batch num_classes"]
    logits: Float[Tensor, "batch num_classes"]
    """The teacher's."""

    def to(self, device: torch.device) -> "Samples":
        """Return them on ``device``; a GPU fetches them while the processor goes on."""
        parts = [self.images, self.soft_labels, self.logits]
        if device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return Samples(*(part.to(device, non_blocking=True) for part in parts))


@dataclass(frozen=True)
class SampleBank:
    """Synthetic samples of one teacher, as 8-bit pixels, and the synthesizer that can draw more.

    The last ``settings.num_held_out`` samples are held out: ``batches`` never yields them.
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
        with torch.no_grad():
            logits = torch.cat([teacher(teacher.input_spec.normalize(part)) for part in pixels.split(64)])
        return cls(pixels, soft_labels, logits, teacher.input_spec, settings, seed, teacher.hash, synthesizer)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_training(self) -> int:
        """Samples that students may learn from; they come first."""
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
        return Batches(self, min(batch_size, self.num_training), rng)

    @property
    def hash(self) -> str:
        """SHA-256 over pixels and soft labels."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.soft_labels.numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path | str) -> None:
        """Write shards, generator and manifest; the directory appears complete or not at all.

        Raises:
            ConfigError: it exists already.
        """
        directory = Path(directory)
        if directory.exists():
            raise ConfigError(f"bank {directory}: exists already; choose another place or remove it")
        partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            with naming(directory):
                self._write(partial)
                sync_tree(partial)  # before what it was made from is removed
                partial.rename(directory)
                sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write(self, directory: Path) -> None:
        per_shard = max(1, _SHARD_BYTES // self.pixels[0].numel())
        shards = []
        for number, start in enumerate(range(0, len(self), per_shard)):
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
        }
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path | str, teacher: Teacher) -> "SampleBank":
        """Read a bank that ``save`` wrote for this teacher.

        Raises:
            ConfigError: no bank there, a damaged one, or one of another teacher.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
            version, owner, seed = manifest["format_version"], manifest["teacher"], manifest["seed"]
            if type(seed) is not int:
                raise TypeError(f"seed is {seed!r:.50}")
            if version != FORMAT_VERSION:
                raise ConfigError(f"bank {directory}: format version {version}, this qimera reads {FORMAT_VERSION}")
            if owner != teacher.hash:
                raise ConfigError(
                    f"bank {directory}: made for another teacher (hash {owner[:12]}, this model has "
                    f"{teacher.hash[:12]}); synthesise a bank for this model and its weights"
                )
            settings, input_spec = _read_settings(directory, manifest["settings"], manifest["input"])
            if input_spec != teacher.input_spec:
                raise ConfigError(
                    f"bank {directory}: made for images of {input_spec}, this teacher takes {teacher.input_spec}"
                )
            names = [str(name) for name in manifest["shards"]]
            if any(Path(name).name != name for name in names):
                raise ConfigError(f"bank {directory}: a shard lies outside of the directory: {names}")
            if len(set(names)) < len(names):
                raise ConfigError(f"bank {directory}: damaged (a shard is named twice: {names}); synthesise it again")
            shards = [load_file(directory / name) for name in names]
            parts = [torch.cat([shard[key] for shard in shards]) for key in ("pixels", "soft_labels", "logits")]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"bank {directory}: {error.filename or 'a file'} is missing; is this a bank?") from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
            raise ConfigError(f"bank {directory}: damaged ({error}); synthesise it again") from error
        _check_shapes(directory, parts, teacher)
        if settings.num_held_out >= len(parts[0]):
            raise ConfigError(
                f"bank {directory}: damaged ({settings.num_held_out} of {len(parts[0])} samples are held out); "
                "synthesise it again"
            )
        synthesizer = _load_synthesizer(directory / "generator.safetensors", teacher, settings)
        return cls(parts[0], parts[1], parts[2], teacher.input_spec, settings, seed, owner, synthesizer)


class Batches(Iterator[Samples]):
    """Batches of a bank's training samples without end; with the random generator, ``order`` says which come next."""

    def __init__(self, bank: SampleBank, batch_size: int, rng: torch.Generator) -> None:
        self._bank, self._batch_size, self._rng = bank, batch_size, rng
        self.order = torch.empty(0, dtype=torch.int64)
        """Positions of samples that are drawn already and not yet used."""

    def __next__(self) -> Samples:
        if len(self.order) < self._batch_size:
            self.order = torch.cat([self.order, torch.randperm(self._bank.num_training, generator=self._rng)])
        chosen, self.order = self.order[: self._batch_size], self.order[self._batch_size :]
        return self._bank.take(chosen)


def _read_settings(directory: Path, settings: object, input_spec: object) -> tuple[SynthesisSettings, InputSpec]:
    try:
        return SynthesisSettings.model_validate(settings), InputSpec.model_validate(input_spec)
    except ConfigError as error:
        raise ConfigError(f"bank {directory}: {error}") from error


def _check_shapes(directory: Path, parts: list[Tensor], teacher: Teacher) -> None:
    count, classes = len(parts[0]), teacher.num_classes
    expected = [(count, *teacher.input_spec.shape), (count, classes), (count, classes)]
    found = [tuple(part.shape) for part in parts]
    if found != expected or parts[0].dtype != torch.uint8:
        raise ConfigError(f"bank {directory}: expected shapes {expected}, found {found} ({parts[0].dtype})")


def _load_synthesizer(path: Path, teacher: Teacher, settings: SynthesisSettings) -> Synthesizer | None:
    if not path.exists():
        return None
    synthesizer = Synthesizer(teacher, settings, torch.Generator().manual_seed(0))
    try:
        synthesizer.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); synthesise the bank again") from error
    return synthesizer.eval()


def check_bank(bank: SampleBank, teacher: Teacher) -> None:
    """Raise ConfigError if ``bank`` is of another teacher, or of other images."""
    if bank.teacher_hash != teacher.hash:
        raise ConfigError(
            f"bank: made for another teacher (hash {bank.teacher_hash[:12]}, this model has {teacher.hash[:12]}); "
            "synthesise a bank for this model and its weights"
        )
    if bank.input_spec != teacher.input_spec:
        raise ConfigError(f"bank: made for images of {bank.input_spec}, this teacher takes {teacher.input_spec}")
