"""crops.py: the same places of what enters student and reference."""

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from qimera.student.crops import Crops


@pytest.mark.parametrize(("stride", "size"), [(1, 40), (2, 80), (1, 12)])
def test_what_should_come_out_of_a_crop_is_part_of_what_comes_out_of_the_map(stride: int, size: int) -> None:
    torch.manual_seed(0)
    reference = symbolic_trace(nn.Conv2d(2, 3, 3, stride=stride, padding=1))
    theirs = torch.randn(4, 2, size, size)
    with torch.no_grad():
        whole = reference(theirs)
    mine = torch.arange(theirs.numel()).view_as(theirs).float()  # tells the place
    entering, target, inside = Crops(mine, theirs, reference, torch.Generator().manual_seed(0)).draw(6)
    margin = 1 if size > 16 * stride else 0
    for crop, answer in zip(entering, target[inside], strict=True):
        place = int(crop[0, 0, 0])
        image, row, column = place // mine[0].numel(), place // size % size, place % size
        top, left = row // stride + margin, column // stride + margin
        expected = whole[image, :, top : top + answer.shape[1], left : left + answer.shape[2]]
        # another kernel of PyTorch's for another size adds up in another order
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    assert answer.shape[1] == (14 if margin else size)


def test_the_same_generator_draws_the_same_crops() -> None:
    reference = symbolic_trace(nn.Conv2d(2, 3, 1))
    maps = torch.randn(4, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    drawn = [Crops(maps, maps, reference, torch.Generator().manual_seed(3)).draw(5)[0] for _ in range(2)]
    assert torch.equal(*drawn)
