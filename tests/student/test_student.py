import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError
from qimera.graph.nodes import WEIGHTED
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, MinMaxFakeQuantize
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, NUM_CLASSES, SPEC, Lambda, behind_stem

SCHEMES = ["hardware", "paper"]


def settings_of(bits: str, scheme: str, layer_bits: str = "") -> QuantizationSettings:
    weight_bits, activation_bits = parse_bits(bits)
    return QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        scheme=scheme,
        layer_bits=parse_layer_bits(layer_bits),
    )


def student_of(
    teacher: Teacher, images: Tensor, bits: str = "w4a4", scheme: str = "hardware", layer_bits: str = ""
) -> Student:
    """Return a student with ranges fitted to the images."""
    return shared.fitted(teacher, images, settings_of(bits, scheme, layer_bits))


def disturb_(student: Student) -> None:
    """Move every parameter a little, as training does."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=rng))


# --- the integer graph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("bits", "layer_bits"),
    [
        ("w2a2", ""),
        ("w3a8", ""),
        ("w4a4", ""),
        ("w5a3", ""),
        ("w8a8", ""),
        ("w4a4", "conv1=8,fc=8,depthwise=w6a7"),
        ("w8a8", "conv*=w2a3"),
    ],
)
def test_the_converted_graph_equals_the_student_bit_for_bit(
    teacher: Teacher, toy_images: Tensor, scheme: str, bits: str, layer_bits: str
) -> None:
    student = student_of(teacher, toy_images[:64], bits, scheme, layer_bits)
    for trained in (False, True):
        if trained:
            disturb_(student)
        converted = student.converted()
        with torch.no_grad():
            for images in (toy_images[64:96], 3 * toy_images[96:97]):
                assert torch.equal(converted(images), student.module(images))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_converted_graph_of_any_network_equals_its_student(name: str, scheme: str) -> None:
    student, images = shared.student_of(name, scheme=scheme), shared.noise()
    with torch.no_grad():
        assert torch.equal(student.converted()(images), student.module(images))


def test_the_converted_graph_holds_integers_and_no_fake_quantizer(teacher: Teacher, toy_images: Tensor) -> None:
    student = student_of(teacher, toy_images[:32], "w3a3")
    converted = student.converted()
    assert not any(isinstance(m, LearnedStepFakeQuantize | MinMaxFakeQuantize) for m in converted.modules())
    integers = [value for value in converted.state_dict().values() if value.dtype == torch.int8]
    assert len(integers) == len(teacher.layers)
    assert min(int(each.min()) for each in integers) >= -4
    assert max(int(each.max()) for each in integers) <= 3
    targets = {str(node.target) for node in converted.graph.nodes}
    assert "quantized_decomposed.quantize_per_tensor.default" in targets
    assert "quantized_decomposed.dequantize_per_channel.default" in targets


def test_converting_leaves_the_student_as_it_is(teacher: Teacher, toy_images: Tensor) -> None:
    student = student_of(teacher, toy_images[:32])
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    student.converted()
    assert all(torch.equal(before[name], value) for name, value in student.module.state_dict().items())
    assert all(each.requires_grad for each in student.parameters())


def test_only_a_student_of_scheme_hardware_has_integers(teacher: Teacher, toy_images: Tensor) -> None:
    assert student_of(teacher, toy_images[:16]).integers(toy_images[:2])
    with pytest.raises(ConfigError, match="integers: scheme paper has none; make the student in scheme hardware"):
        student_of(teacher, toy_images[:16], scheme="paper").integers(toy_images[:2])


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_quantizer_gets_a_range(teacher: Teacher, toy_images: Tensor, scheme: str) -> None:
    student = student_of(teacher, toy_images[:64], scheme=scheme)
    quantizers = [m for m in student.modules() if isinstance(m, LearnedStepFakeQuantize | MinMaxFakeQuantize)]
    assert quantizers
    for quantizer in quantizers:
        assert quantizer.searching is None
        assert bool((quantizer.scale != 1).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranges_that_are_found_again_are_those_of_the_last_images_alone(
    teacher: Teacher, toy_images: Tensor, scheme: str
) -> None:
    settings = QuantizationSettings(scheme=scheme)
    once, twice = Student(teacher, settings), Student(teacher, settings)
    twice.initialize_ranges_([5 * toy_images[:16], 5 * toy_images[16:32]])
    for student in (once, twice):
        student.initialize_ranges_([toy_images[:16], toy_images[16:32]])
    found = twice.module.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in once.module.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_with_eight_bits_the_student_answers_as_the_teacher(teacher: Teacher, toy_images: Tensor, scheme: str) -> None:
    student = student_of(teacher, toy_images[:128], "w8a8", scheme)
    with torch.no_grad():
        agreement = (student(toy_images).argmax(1) == teacher(toy_images).argmax(1)).float().mean()
    assert float(agreement) >= 0.99


def test_a_student_made_with_minus_128_is_read_with_minus_127(
    tmp_path: Path, teacher: Teacher, toy_images: Tensor
) -> None:
    student = student_of(teacher, toy_images[:16], "w8a8")
    with torch.no_grad():
        for weight, step in student.weight_steps():
            weight[0] = -128 * step[0]
    student.save_state(tmp_path / "student.safetensors")
    again = Student.load_state(tmp_path / "student.safetensors", teacher, student.settings)
    integers = dict(again.converted().named_buffers())["conv1.weight"]
    assert int(integers.min()) == int(integers[0].min()) == -127


def test_more_bits_bring_the_logits_nearer_to_the_teachers(teacher: Teacher, toy_images: Tensor) -> None:
    errors = []
    for bits in ("w2a2", "w3a3", "w4a4", "w8a8"):
        student = student_of(teacher, toy_images[:128], bits)
        with torch.no_grad():
            errors.append(float((student(toy_images) - teacher(toy_images)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_ranges_are_fitted_behind_quantized_predecessors(teacher: Teacher, toy_images: Tensor) -> None:
    """At 2 bits the second layer reads other values than in full precision, so its range must suit those."""
    student = student_of(teacher, toy_images[:64], "w2a2")
    nodes = [node for node in student.module.graph.nodes if node.target in WEIGHTED]
    entering = nodes[2].args[0]
    quantizer = student.module.get_submodule(str(entering.target))
    assert isinstance(quantizer, LearnedStepFakeQuantize)
    with torch.no_grad():
        _, (seen,) = student.with_features([entering.args[0].name])(toy_images[:64])
        twin = copy.deepcopy(quantizer)
        twin.fit_(seen, "mse")
    assert torch.equal(twin.scale, quantizer.scale)


def test_min_max_ranges_average_over_the_batches(teacher: Teacher, toy_images: Tensor) -> None:
    def first_scale(*batches: Tensor) -> float:
        student = Student(teacher, settings_of("w4a4", "paper"))
        student.initialize_ranges_(iter(batches))
        activations = [m for m in student.modules() if isinstance(m, MinMaxFakeQuantize) and not m.per_call]
        return float(activations[0].scale)

    one, other = toy_images[:8], 2 * toy_images[8:16]
    mean = (first_scale(one) + first_scale(other)) / 2
    assert first_scale(one, other) == pytest.approx(mean, rel=1e-5)  # float32


# --- parameters -------------------------------------------------------------------------------------------------------


def test_every_parameter_is_a_step_or_a_weight(teacher: Teacher) -> None:
    student = Student(teacher, settings_of("w4a4", "hardware"))
    steps, weights = ({id(each) for each in group} for group in (student.steps, student.weights))
    assert not steps & weights
    assert steps | weights == {id(each) for each in student.parameters()}
    quantizers = [m for m in student.modules() if isinstance(m, LearnedStepFakeQuantize)]
    assert len(steps) == len(quantizers)


def test_the_paper_scheme_has_no_steps_to_learn(teacher: Teacher) -> None:
    student = Student(teacher, settings_of("w4a4", "paper"))
    assert student.steps == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_quantized_weight_comes_with_the_step_of_its_channels(
    teacher: Teacher, toy_images: Tensor, scheme: str
) -> None:
    pairs = student_of(teacher, toy_images[:32], scheme=scheme).weight_steps()
    assert sorted(weight.numel() for weight, _ in pairs) == sorted(
        torch.Size(layer.weight_shape).numel() for layer in teacher.layers
    )
    for weight, step in pairs:
        assert step.shape == (len(weight), *(1 for _ in weight.shape[1:]))
        levels = weight / step
        assert float(levels.detach().abs().max()) < 20  # of 8; the search cuts outliers off


def test_a_fixed_matrix_that_multiplies_activations_is_quantized_and_not_trained() -> None:
    mixing = Lambda(lambda x, weight: torch.matmul(weight, x), torch.randn(16, 16), fixed=True)
    student = Student(Teacher.capture(behind_stem(mixing), SPEC), settings_of("w4a4", "hardware"))
    assert {tuple(weight.shape) for weight, _ in student.weight_steps()} == {(8, 3, 3, 3), (NUM_CLASSES, 8)}


def test_a_student_shares_no_memory_with_its_teacher(teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for scheme in SCHEMES:
        student = Student(teacher, settings_of("w4a4", scheme))
        own = {each.data_ptr() for each in teacher.parameters()}
        assert not own & {each.data_ptr() for each in student.parameters()}
        disturb_(student)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_student_answers_as_integer_kernels_do_unless_it_is_trained(teacher: Teacher, toy_images: Tensor) -> None:
    student = student_of(teacher, toy_images[:64])
    with torch.no_grad():
        expected, in_floats = student(toy_images[64:96]), student.module(toy_images[64:96])
    for logits in (student(toy_images[64:96]), student.eval()(toy_images[64:96]), student.to("cpu")(toy_images[64:96])):
        assert torch.equal(logits, expected)
        assert not logits.requires_grad
    trained = student.train()(toy_images[64:96])
    assert trained.requires_grad
    assert torch.equal(trained, in_floats)
    assert torch.equal(student.eval()(toy_images[64:96]), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_gets_a_gradient(teacher: Teacher, toy_images: Tensor, scheme: str) -> None:
    student = student_of(teacher, toy_images[:64], "w3a3", scheme)
    (student.train()(toy_images[:64]) ** 2).sum().backward()
    without = [name for name, each in student.named_parameters() if each.grad is None or not each.grad.any()]
    assert without == []


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_student_comes_back_with_the_same_logits(
    teacher: Teacher, toy_images: Tensor, tmp_path: Path, scheme: str
) -> None:
    student = student_of(teacher, toy_images[:64], "w3a5", scheme, "fc=8")
    disturb_(student)
    student.save_state(str(tmp_path / "student.safetensors"))
    loaded = Student.load_state(str(tmp_path / "student.safetensors"), teacher, student.settings)
    with torch.no_grad():
        assert torch.equal(loaded(toy_images), student(toy_images))
        assert torch.equal(loaded.converted()(toy_images), student.converted()(toy_images))


@pytest.mark.parametrize("damage", ["missing", "cut off", "of another scheme"])
def test_a_file_that_holds_no_such_student_is_refused(
    teacher: Teacher, toy_images: Tensor, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "student.safetensors"
    scheme = "paper" if damage == "of another scheme" else "hardware"
    student_of(teacher, toy_images[:16], scheme=scheme).save_state(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"student\.safetensors: does not hold the student of these settings"):
        Student.load_state(path, teacher, settings_of("w4a4", "hardware"))


def test_a_file_whose_tensors_are_of_other_types_is_refused(
    teacher: Teacher, toy_images: Tensor, tmp_path: Path
) -> None:
    student = student_of(teacher, toy_images[:16])
    student.save_state(tmp_path / "state")
    student.save(tmp_path / "whole")
    for place, name in ((tmp_path / "state", "fc.weight"), (tmp_path / "whole", "student/fc.weight")):
        with safe_open(place, "pt") as file:
            notes, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        save_file({**tensors, name: tensors[name].double()}, place, notes)
        with pytest.raises(
            ConfigError, match=rf"{place.name}: damaged \(fc.weight is of type torch.float64, and torch"
        ):
            Student.load(place) if place.name == "whole" else Student.load_state(place, teacher, student.settings)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_file_brings_a_student_back_without_its_teacher(
    teacher: Teacher, toy_images: Tensor, tmp_path: Path, scheme: str
) -> None:
    student = student_of(teacher, toy_images[:64], "w3a5", scheme, "fc=8")
    disturb_(student)
    student.save(tmp_path / "student.safetensors")
    loaded = Student.load(tmp_path / "student.safetensors")
    assert torch.equal(loaded(toy_images), student(toy_images))
    assert (loaded.settings, loaded.input_spec) == (student.settings, student.input_spec)
    assert loaded.teacher_hash == teacher.hash


@pytest.mark.parametrize("damage", ["missing", "cut off", "a teacher", "a state"])
def test_a_file_without_a_whole_student_is_refused(
    teacher: Teacher, toy_images: Tensor, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "student.safetensors"
    student = student_of(teacher, toy_images[:16])
    student.save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        {"a teacher": teacher.save, "a state": student.save_state}[damage](path)
    with pytest.raises(ConfigError, match=r"student\.safetensors: does not hold a "):
        Student.load(path)


def test_ranges_stay_where_they_are_once_a_search_has_failed(teacher: Teacher, toy_images: Tensor) -> None:
    student = Student(teacher, settings_of("w4a4", "hardware"))
    with pytest.raises(RuntimeError):
        student.initialize_ranges_([toy_images[:4, :2]])
    before = [step.clone() for step in student.steps]
    student(toy_images[:4])
    assert all(torch.equal(step, kept) for step, kept in zip(student.steps, before, strict=True))
