"""Real trained classifiers, where a folder of them exists (QIMERA_ZOO)."""

import pytest
import torch

from benchmarks.zoo import FOLDER, load_subject, load_zoo
from qimera.assessment.data import LabelledImages
from qimera.assessment.evaluation import evaluate
from qimera.config.settings import DirectSettings, DistillationSettings, SynthesisSettings
from qimera.graph.folding import fold_batch_norms
from qimera.pipeline import quantize, synthesize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "zoo.py").is_file(), reason="QIMERA_ZOO names no folder with a zoo.py"),
]


@pytest.mark.parametrize("name", ["resnet20_cifar10", "mobilenetv2_cifar10", "mobilenet_v1_075_imagenet"])
def test_a_real_model_survives_eight_bits_without_training(name: str) -> None:
    """A bank of a few quickly made samples and searched ranges alone; no weight moves."""
    zoo = load_zoo()
    assert zoo is not None
    if name not in zoo.TEACHERS:
        pytest.skip(f"the zoo has no {name}")
    teacher, images = load_subject(name)
    step = max(1, len(images) // 400)
    some = LabelledImages(images.images[::step], images.labels[::step])
    probe = teacher.input_spec.normalize(torch.from_numpy(some.images[:8]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = teacher(probe)
        # rounding of folded weights
        slack = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(fold_batch_norms(teacher.module)(probe), expected, rtol=0, atol=slack)
    settings = SynthesisSettings(num_optimized=32, direct=DirectSettings(num_steps=20, batch_size=32))
    bank = synthesize(teacher, settings=settings)
    student = quantize(teacher, bank, "w8a8", settings=DistillationSettings(num_steps=0))
    with torch.no_grad():
        assert torch.equal(student.converted()(probe), student.train()(probe))  # in floating point, both
    student.eval()
    result = evaluate(student, some, teacher.input_spec, teacher=teacher)
    assert result.teacher_top1 is not None
    assert result.top1 > result.teacher_top1 - 2  # 400 images: 8 of them
