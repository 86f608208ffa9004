from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.export import Dim

from qimera.errors import ConfigError
from qimera.teacher.exported_programs import read_program
from qimera.teacher.sources import known_input, load_model
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, TinyNet


def save(model: nn.Module, path: Path, *inputs: Tensor, dynamic: bool = True) -> Path:
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs) if dynamic else None
    torch.export.save(torch.export.export(model.eval(), inputs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(TinyNet(), tmp_path_factory.mktemp("program") / "tiny.pt2", torch.zeros(2, *SPEC.shape))


def test_a_program_is_a_model_whose_input_shape_is_known(archive: Path) -> None:
    torch.manual_seed(0)
    model, images = TinyNet().eval(), torch.randn(3, *SPEC.shape)
    loaded = load_model(str(archive))
    assert known_input(str(archive), loaded) == {"shape": SPEC.shape}
    teacher = Teacher.capture(loaded, SPEC)
    torch.testing.assert_close(teacher(images), model(images))
    assert [layer.name for layer in teacher.layers] == [layer.name for layer in Teacher.capture(model, SPEC).layers]


def test_a_program_for_one_batch_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = save(TinyNet(), tmp_path / "fixed.pt2", torch.zeros(2, *SPEC.shape), dynamic=False)
    with pytest.raises(ConfigError, match=r"takes batches of exactly 2; export it with dynamic_shapes"):
        load_model(str(path))


def test_a_program_for_images_of_any_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.export.save(
        torch.export.export(model, (torch.zeros(2, *SPEC.shape),), dynamic_shapes=shapes), tmp_path / "sizes.pt2"
    )
    with pytest.raises(ConfigError, match=r"takes images of more than one size; export it so that only its batches"):
        load_model(str(tmp_path / "sizes.pt2"))


class Tied(nn.Module):
    """Two convolutions with one weight, a part without gradients, a constant that is not saved as state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.third, self.head = nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)
        self.third.weight = self.second.weight
        self.register_buffer("factor", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.norm(self.first(x)).relu()
        x, _ = self.third(self.second(x)).chunk(2, 2)
        return self.head(x.mean((2, 3))).view(x.shape[0], -1) * self.factor


def test_tied_weights_regions_and_parts_of_tuples_are_read(tmp_path: Path) -> None:
    model, images = Tied().eval(), torch.randn(3, *SPEC.shape)
    path = save(model, tmp_path / "tied.pt2", torch.zeros(2, *SPEC.shape))
    network = read_program(path)
    with torch.no_grad():
        assert torch.equal(network(images), model(images))
    assert [layer.name for layer in Teacher.capture(network, SPEC).layers] == ["first", "third", "third", "head"]


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_program_with_two_inputs_is_refused(tmp_path: Path) -> None:
    path = save(TwoInputs(), tmp_path / "two.pt2", torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="takes 2 inputs"):
        load_model(str(path))


def test_a_missing_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*absent\.pt2"):
        load_model(str(tmp_path / "absent.pt2"))


@given(share=st.floats(0, 0.999))
def test_a_truncated_program_is_refused(archive: Path, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("truncated") / "tiny.pt2"
    content = archive.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ConfigError,
        match=r"not a file of torch\.export\.save, or damaged|is not in the format|nothing of it was executed",
    ):
        read_program(path)
