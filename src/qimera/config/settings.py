"""Frozen, validated settings of every stage: one field per knob, its unit and its source."""

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, model_validator

from qimera.config.base import Settings
from qimera.errors import ConfigError
from qimera.machine.modes import Compile, Precision, Target


class LabelSettings(Settings):
    """Which classes a synthetic sample should show (Choi et al. 2021, superposed latent embeddings)."""

    superposition: bool = True
    """Mix several classes into some samples, so that they support the teacher's decision boundaries."""

    superposition_probability: float = Field(0.4, ge=0, le=1)
    """Share of samples that are superposed (p in the paper's experiments)."""

    num_superposed_classes: int = Field(2, ge=2)
    """Classes mixed into one superposed sample (K in the paper)."""

    per_sample: bool = True
    """Decide for each sample whether it is superposed; the authors' code decides for whole batches."""


class LossSettings(Settings):
    """What samples are judged by, and how such a step computes; for the generator and for directly optimised images."""

    ce_weight: float = Field(0.05, ge=0)
    bns_weight: float = Field(5.0, ge=0)
    """Weight of the batch-normalization statistics loss, averaged over layers."""

    layer_norm_weight: float = Field(1.0, ge=0)
    """Weight of the loss that keeps channels behind layer norms alive, where there are any (deviation D34)."""

    attention_weight: float = Field(1.0, ge=0)
    """Weight of ``attention_loss``, where there is attention."""

    attention_loss: Literal["spread", "entropy", "heads"] = "spread"
    """How samples are judged by attention: by the spread of similarities between tokens (ours, deviation D35), by its
    ``entropy`` (PSAQ-ViT, Li et al. 2022), or by the likeness of ``heads`` (MimiQ, Choi et al. 2025)."""

    tv_weight: float = Field(0.05, ge=0)
    """Weight of the mean absolute difference between neighbouring pixels; the authors have none (deviation D33)."""

    max_shift: int = Field(2, ge=0)
    """Largest random shift of the batch before the teacher sees it, in pixels (deviation D33)."""

    precision: Precision = "auto"
    """Of convolutions and matrix products; ``auto``: ``bfloat16`` where the processor multiplies it faster."""

    compile: Compile = "auto"
    """Fuse the step with ``torch.compile``, as in the training of the student."""


class GeneratorSettings(LossSettings):
    """The conditional generator, its latents and its training against the teacher alone."""

    num_steps: int = Field(200, ge=0)
    """Training steps before the first sample is taken."""

    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    """Of Adam with betas (0.5, 0.999), as the authors."""

    extracted_embeddings: bool = True
    """Start the class embeddings from the rows of the teacher's classifier weight (EEI)."""

    disentanglement_mapping: bool = True
    """Map each class latent linearly before superposition (DM); off, the generator's first layer sees it directly."""

    embedding_dim: int = Field(100, ge=2)
    """Width of random class embeddings; extracted ones are as wide as the classifier's input."""

    mapping_dim: int = Field(64, ge=2)
    """Width that the disentanglement mapping leads to (deviation D25)."""

    noise_scale: float = Field(1.0, ge=0)
    """Standard deviation of the noise added to a class embedding, in that of the embedding (deviation D20)."""

    base_channels: int = Field(64, ge=8)
    """Channels of the generator's first feature map, and of the second; from there on half of them at each doubling."""

    num_doublings: int = Field(0, ge=0, le=8)
    """Doublings of the resolution behind the linear layer; 0: from 4 to 7 pixels. The authors make 2 (D32)."""

    sum_of_scales: bool = True
    """Let every resolution add an image of its own; off, the last one makes the image, as the authors' (D33)."""

    conditional_norm_from: int = Field(200, ge=2)
    """Number of classes from which the generator's batch norms are conditioned on the class (deviation D26)."""

    relative_bns: bool = True
    """Divide statistics by their variances, so that every channel counts alike (deviation D7)."""

    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the gap between student and teacher, which a generator beside the student enlarges (ZAQ, 2021)."""

    milestones: tuple[int, ...] = ()
    """Steps after which the learning rate is divided by ten."""

    @model_validator(mode="after")
    def _check(self) -> "GeneratorSettings":
        if self.num_steps and not (self.ce_weight or self.bns_weight or self.adversarial_weight):
            raise ValueError(
                "ce_weight, bns_weight and adversarial_weight are all 0, so that nothing would be learned; set one of "
                "them above 0, or num_steps to 0"
            )
        return self


class DirectSettings(LossSettings):
    """Images optimised directly against the generator's losses (ZeroQ, with labels and superposition)."""

    num_steps: int = Field(80, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(0.1, gt=0)
    """Of Adam, in the unit of normalised pixels, cosine to zero."""

    num_scales: int = Field(5, ge=1)
    """Resolutions, each half of the one before, that an image is the sum of; 1 is ZeroQ's plain pixels.

    Coarse scales move as fast as fine ones, so that images come out smooth and lifelike (deviation D13).
    """

    start: Literal["noise", "generator"] = "noise"
    """What images are initialised with."""

    flip: bool = False
    """Mirror each image at random in every step; only for classes that look the same in a mirror (not for digits)."""

    @model_validator(mode="after")
    def _check(self) -> "DirectSettings":
        if not (self.ce_weight or self.bns_weight or self.tv_weight):
            raise ValueError(
                "ce_weight, bns_weight and tv_weight are all 0: images would stay as they are; set one above 0"
            )
        return self


class SynthesisSettings(Settings):
    """How a bank of synthetic samples is made; one bank serves every bit width."""

    num_generated: int = Field(0, ge=0)
    """Samples drawn from the trained generator."""

    num_optimized: int = Field(512, ge=0)
    """Samples optimised directly."""

    num_held_out: int = Field(0, ge=0)
    """Additional samples that no student learns from; they judge the student."""

    memory_gib: float = Field(6.0, gt=0)
    """Memory for the activations of one step, in GiB; batches that need more are made smaller."""

    labels: LabelSettings = LabelSettings()
    generator: GeneratorSettings = GeneratorSettings()
    direct: DirectSettings = DirectSettings()

    @model_validator(mode="after")
    def _check(self) -> "SynthesisSettings":
        if self.num_generated + self.num_optimized == 1:
            raise ValueError("num_generated and num_optimized must give at least 2 samples together, or none at all")
        return self


class LayerBits(Settings):
    """Bits of the layers whose name matches a shell pattern."""

    pattern: str
    weight_bits: int = Field(ge=2, le=8)
    activation_bits: int = Field(ge=2, le=8)


class QuantizationSettings(Settings):
    """What is quantized, and to how many bits."""

    weight_bits: int = Field(4, ge=2, le=8)
    activation_bits: int = Field(4, ge=2, le=8)
    scheme: Literal["hardware", "paper"] = "hardware"
    """``hardware``: what integer kernels need. ``paper``: as GDFQ and Qimera quantize, for comparison only."""
    target: Target = "onnxruntime"
    """Whose kernels decide where tensors are rounded (hardware scheme), and how: OpenVINO and Inductor round behind the
    addition after a convolution, all others before; ``litert-builtin`` and ``tflm`` (microcontrollers) round twice."""

    layer_bits: tuple[LayerBits, ...] = ()
    """Exceptions by layer name; the last matching pattern wins."""

    first_last_bits: Literal[0, 2, 3, 4, 5, 6, 7, 8] = 0
    """Bits of the layers that read the network's input, of what they return, and of the layer that returns the logits;
    0 for those of all others. A run writes them into ``layer_bits``, before the exceptions that were given."""

    budget: str = ""
    """Share of full precision for all layers together, such as ``size=0.14`` or ``bops=0.05``; empty for no limit. A
    run chooses bits for the layers that ``layer_bits`` does not name, and adds them to it."""

    edge_bits: int = Field(8, ge=2, le=8)
    """Bits of tensors that enter additions, concatenations and pooling (hardware scheme)."""

    input_bits: int = Field(8, ge=2, le=8)
    """Bits of the network's input (hardware scheme)."""

    num_range_samples: int = Field(256, ge=1)
    """Bank samples that the first ranges are searched on, and first integers found."""

    @model_validator(mode="after")
    def _check(self) -> "QuantizationSettings":
        if self.scheme == "paper" and self.target != "onnxruntime":
            raise ValueError(
                f"target {self.target} is for scheme hardware; scheme paper is for comparison, and no kernels run it: "
                "leave target out"
            )
        return self

    def bits_of(self, layer: str) -> tuple[int, int]:
        """Return (weight bits, activation bits) of the layer called ``layer``."""
        bits = (self.weight_bits, self.activation_bits)
        for rule in self.layer_bits:
            if fnmatchcase(layer, rule.pattern):
                bits = (rule.weight_bits, rule.activation_bits)
        return bits

    def has_rule_for(self, layer: str) -> bool:
        """Return whether ``layer_bits`` names the layer called ``layer``."""
        return any(fnmatchcase(layer, rule.pattern) for rule in self.layer_bits)


class DistillationSettings(Settings):
    """How the student is trained to reproduce the teacher's answers."""

    num_steps: int = Field(2000, ge=0)

    start: Literal["compensated", "nearest"] = "nearest"
    """The student before the first step: every weight at its nearest integer, or with errors of rounding made up for
    (scheme ``hardware``, deviation D29): better where few steps follow, and worse after thousands."""

    equalize: bool = True
    """Scale channels between layers where that lessens the error behind them (``compensated``, deviation D30)."""

    reconstructed_blocks: int = Field(0, ge=0)
    """First blocks whose integers are then trained; they read at most 4 bits (``compensated``, deviation D37)."""

    batch_size: int = Field(16, ge=1)
    """Small batches give more steps for the same compute: at W3A3 2 points more with 32 than with 64 (ours)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """``adam`` counts weights in quantizer steps; ``sgd`` is that of GDFQ and Qimera, with one rate for all."""

    weight_learning_rate: float = Field(3e-3, gt=0)
    """Of quantized weights: with ``adam`` in quantizer steps, with ``sgd`` in the unit of the weights."""

    bias_learning_rate: float = Field(3e-4, gt=0)
    """Of biases and batch norms that were not folded (``adam``)."""

    step_learning_rate: float = Field(2e-3, gt=0)
    """Of the logarithm of every quantizer step (``adam``)."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov momentum (``sgd``)."""

    weight_decay: float = Field(0.0, ge=0)
    """Of weights, biases and batch norms that were not folded, not of quantizer steps (``sgd``)."""

    schedule: Literal["cosine", "milestones"] = "cosine"
    """``cosine`` falls to zero over the run; ``milestones`` is that of GDFQ and Qimera (deviation D15)."""

    milestones: tuple[int, ...] = ()
    """Steps after which learning rates are divided by ten (schedule ``milestones``)."""

    kl_weight: float = Field(1.0, ge=0)
    """Weight of the divergence from the teacher's class probabilities, per sample (``batchmean``)."""

    temperature: float = Field(1.0, gt=0)
    ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the sample's soft label."""

    feature_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of block outputs over the teacher's variance, averaged over blocks."""

    fresh_share: float = Field(0.0, ge=0, le=1)
    """Share of each batch that the generator draws anew; the rest comes from the bank."""

    generator_steps_per_step: int = Field(0, ge=0)
    """Generator training steps before each student step; the paper alternates one and one."""

    blend_probability: float = Field(0.5, ge=0, le=1)
    """Share of bank samples that are blended with another one of the batch."""

    max_shift: int = Field(4, ge=0)
    """Largest random shift of bank samples, in pixels."""

    flip: bool = True
    """Mirror bank samples at random."""

    precision: Precision = "auto"
    """Of the teacher's convolutions and matrix products, and of the gradients of the student's convolutions; ``auto``:
    ``bfloat16`` where the processor multiplies it fast. What the student answers is float32 always."""

    compile: Compile = "auto"
    """Fuse the step with ``torch.compile``, which takes a minute; ``auto``: where there are steps enough to earn it."""

    memory_gib: float = Field(6.0, gt=0)
    """Memory for the activations of one step, in GiB; batches that need more are made smaller."""

    select_every: int = Field(0, ge=0)
    """Steps between two estimates of the drop; the state of the lowest one is the result. 0 takes the last step."""

    @model_validator(mode="after")
    def _check(self) -> "DistillationSettings":
        if self.num_steps and not (self.kl_weight or self.ce_weight or self.feature_weight):
            raise ValueError(
                "kl_weight, ce_weight and feature_weight are all 0, so that nothing would be learned; set one of them "
                "above 0, or num_steps to 0"
            )
        if self.milestones and self.schedule == "cosine":
            raise ValueError("milestones are for schedule milestones, given schedule cosine; leave one out")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("weight_decay is for optimizer sgd, given optimizer adam; leave one out")
        return self


def check_start(quantization: QuantizationSettings, distillation: DistillationSettings) -> None:
    """Refuse a start that the scheme does not support.

    Raises:
        ConfigError: integers that make up for errors of rounding, which min-max ranges have not.
    """
    if quantization.scheme == "paper" and distillation.start == "compensated":
        raise ConfigError(
            "start: compensated integers are for scheme hardware, given scheme paper; choose a recipe that trains, "
            "such as paper, set start to nearest, or leave scheme out"
        )
