"""What moves values about: it keeps them on the grid that its result says."""

import pytest

pytest.importorskip("ai_edge_litert", reason="pip install 'qimera[litert]'")

from qimera.lowering.moves import concatenate
from qimera.lowering.values import CHANNELS_LAST, Deferred
from qimera.lowering.writer import Writer
from qimera.student.grids import Levels, grid_of


def test_parts_with_fewer_of_the_levels_are_brought_to_the_grid_of_the_whole() -> None:
    """A clip in front of a part leaves it fewer levels, which lie elsewhere in int8."""
    w = Writer()
    wide, narrow = Levels(0.1, 0, 0, 15), Levels(0.1, 0, 0, 9)
    parts = [w.output((1, 2, 4, 4), CHANNELS_LAST, grid_of(each)) for each in (wide, narrow)]
    w.shape = (1, 4, 4, 4)
    joined = concatenate(w, parts, 1)
    assert isinstance(joined, Deferred)
    joined.write(wide)
    inputs = [w.file.tensors[number] for number in w.file.operators[-1].inputs]
    assert [each.quantization.zeroPoint[0] for each in inputs] == [grid_of(wide).zero_point] * 2
