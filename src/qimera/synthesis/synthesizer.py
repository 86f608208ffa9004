"""Class embeddings, mapping, superposition and generator in one piece, and the training of it against the teacher."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import SynthesisSettings
from qimera.machine.acceleration import autocast, begin_step, compiled, is_compiled
from qimera.machine.checkpoint import State
from qimera.machine.distributed import average_gradients_, rank, world_size
from qimera.machine.divergence import check_finite
from qimera.machine.seeds import Stream, generator_for
from qimera.synthesis.augmentation import shift_batch
from qimera.synthesis.embeddings import ClassEmbedding, DisentanglementMapping
from qimera.synthesis.generator import Generator
from qimera.synthesis.losses import realism_terms, soft_cross_entropy, total_of, total_variation
from qimera.synthesis.superposition import draw_mixtures, soft_labels, superpose, take_turns
from qimera.teacher.teacher import Teacher


class Draw(NamedTuple):
    """What a batch of samples is drawn from: mixtures of classes and latent noise."""

    label: Int[Tensor, "batch k"]
    weight: Float[Tensor, "batch k"]
    noise: Float[Tensor, "batch k latent"]


class Synthesizer(nn.Module):
    """Draws images near and across the teacher's decision boundaries (Choi et al. 2021)."""

    def __init__(self, teacher: Teacher, settings: SynthesisSettings, rng: torch.Generator) -> None:
        super().__init__()
        spec, num_classes = settings.generator, teacher.num_classes
        self.labels, self.num_classes, self.precision = settings.labels, num_classes, spec.precision
        with torch.random.fork_rng(devices=[]):  # modules draw their start from the global generator
            # not torch.manual_seed, which seeds the generators of GPUs too
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=rng)))
            self.embedding = ClassEmbedding(teacher.classifier.weight, spec, rng)
            latent_dim = self.embedding.latent_dim
            self.mapping: nn.Module = nn.Identity()
            if spec.disentanglement_mapping:
                self.mapping = DisentanglementMapping(latent_dim, spec.mapping_dim)
                latent_dim = spec.mapping_dim
            self.generator = Generator(latent_dim, teacher.input_spec, spec, num_classes)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.weight.device

    def draw(self, num_samples: int, rng: torch.Generator, first: Int[Tensor, " batch"] | None = None) -> Draw:
        """Draw what ``num_samples`` images are made from; their first classes take turns where they are not given.

        Drawn on the CPU, so that every device sees the same, and brought to where the generator is.
        """
        first = take_turns(num_samples, self.num_classes, rng) if first is None else first
        label, weight = draw_mixtures(first, self.num_classes, self.labels, rng)
        noise = torch.randn(*label.shape, self.embedding.latent_dim, generator=rng)
        return Draw(*(each.to(self.device) for each in (label, weight, noise)))

    def forward(
        self, drawn: Draw
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch num_classes"]]:
        """Return the images and their soft labels."""
        soft_label = soft_labels(drawn.label, drawn.weight, self.num_classes)
        latent = superpose(self.mapping(self.embedding(drawn.label, drawn.noise)), drawn.weight)
        with autocast(self.precision, self.device):
            return self.generator(latent, soft_label), soft_label


class SynthesizerTraining:
    """The generator's side of the game: each step makes a batch that the teacher finds more real."""

    def __init__(
        self,
        synthesizer: Synthesizer,
        teacher: Teacher,
        settings: SynthesisSettings,
        seed: int,
        student: nn.Module | None = None,
        num_steps: int = 0,
    ) -> None:
        """``num_steps`` are those that it will make, by which compiling is decided; 0 if they are the settings' own."""
        self.synthesizer, self.teacher, self.student = synthesizer, teacher, student
        self.settings, self.seed = settings.generator, seed
        self._last_step = num_steps or self.settings.num_steps
        num_pixels = self.settings.batch_size * math.prod(teacher.input_spec.shape[1:])
        self.is_compiled = is_compiled(self.settings.compile, self._last_step, num_pixels, teacher.device)
        self._make = compiled(synthesizer, self.is_compiled, teacher.device)
        self._judge = compiled(self._losses, self.is_compiled, teacher.device)
        self.optimizer = torch.optim.Adam(synthesizer.parameters(), self.settings.learning_rate, betas=(0.5, 0.999))
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, list(self.settings.milestones), 0.1)
        self.num_steps = 0

    def step(self) -> dict[str, Tensor]:
        """Train on one fresh batch: L_G = CE(soft label) + weight * BNS (Choi et al. 2021, after GDFQ), and smoothness.

        The batch is shifted at random before the teacher sees it (deviation D33). With a student and
        ``adversarial_weight``, samples are also sought on which it differs from the teacher.
        Each of several processes draws its share of the batch.

        Returns:
            The loss terms, not yet copied from the device.

        Raises:
            DivergenceError: a term is NaN or infinite.
        """
        begin_step(self.teacher.device)
        self.synthesizer.train()
        place = Stream.TRAINING_ALONE if self.student is None else Stream.TRAINING_BESIDE_STUDENT
        rng = generator_for(self.seed, place, self.num_steps, rank())
        num_samples = -(-self.settings.batch_size // world_size())
        images, soft_label = self._make(self.synthesizer.draw(num_samples, rng))
        max_shift = self.settings.max_shift
        seen = shift_batch(images, max_shift, rng) if max_shift else images
        loss, losses = self._judge(seen.contiguous(memory_format=torch.channels_last), soft_label)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(self.synthesizer.parameters()))  # the student's own gradients are not touched
        average_gradients_(self.synthesizer.parameters())
        self.optimizer.step()
        self.schedule.step()
        self.num_steps += 1
        return check_finite(losses, self.num_steps, self._last_step)

    def _losses(self, images: Tensor, soft_label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of all terms, and each of them without its weight or gradient."""
        settings = self.settings
        with autocast(settings.precision, images.device):
            logits, taps = self.teacher.forward_with_taps(images)
        logits = logits.float()
        terms = {"generator_ce": (settings.ce_weight, soft_cross_entropy(logits, soft_label))}
        terms |= realism_terms("generator", taps, self.teacher, settings, relative=settings.relative_bns)
        if settings.tv_weight:
            terms["generator_tv"] = (settings.tv_weight, total_variation(images))
        if self.student is not None and settings.adversarial_weight:
            gap = F.l1_loss(self.student(images), logits)
            terms["generator_gap"] = (-settings.adversarial_weight, gap)
        return total_of(terms)

    def state_dict(self) -> State:
        """Return what ``load_state_dict`` needs to go on."""
        return {
            "synthesizer": self.synthesizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: State) -> None:
        """Go back to a state that ``state_dict`` returned."""
        self.synthesizer.load_state_dict(state["synthesizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.num_steps = int(state["num_steps"])
