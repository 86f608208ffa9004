"""Views of memory: what PyTorch sees after any chain of moves is what the file's tensor holds."""

import math

import numpy as np
from hypothesis import given, strategies as st

from qimera.lowering.values import CHANNELS_LAST, Value


def seen(value: Value, memory: np.ndarray) -> np.ndarray:
    """Return what PyTorch sees of the numbers in memory."""
    assert not value.parts
    return memory.reshape(value.stored).transpose(np.argsort(value.order))


def maps() -> tuple[Value, np.ndarray, np.ndarray]:
    """Return a value of two by three positions and four channels, what PyTorch sees, and its memory."""
    array = np.arange(24).reshape(1, 4, 2, 3)
    return Value(0, (1, 2, 3, 4), array.shape, CHANNELS_LAST), array, array.transpose(CHANNELS_LAST).copy()


@given(st.data())
def test_permuting_and_reshaping_move_nothing_in_memory(data: st.DataObject) -> None:
    value, array, memory = maps()
    for _ in range(4):
        if data.draw(st.booleans()):
            axes = data.draw(st.permutations(range(len(value.shape))))
            value, array = value.permuted(axes), array.transpose(axes)
        else:
            shape = tuple(
                data.draw(st.sampled_from([(1, 4, 6), (4, 6), (24,), (1, 6, 4), (1, 4, 2, 3), (2, 12), (8, 3)]))
            )
            found = value.reshaped(shape)
            if found is not None:
                value, array = found, array.reshape(shape)
        assert (seen(value, memory) == array).all()


def test_tokens_of_maps_are_read_from_memory_as_they_lie() -> None:
    value, array, memory = maps()
    flat = value.reshaped((1, 4, 6))
    assert flat is not None
    tokens = flat.permuted((0, 2, 1))
    assert tokens.order == (0, 1, 2)
    assert (seen(tokens, memory) == array.reshape(1, 4, 6).transpose(0, 2, 1)).all()


def test_flattening_maps_keeps_the_order_of_memory_in_mind() -> None:
    value, _, _ = maps()
    assert value.reshaped((1, 24)) is None
    flat = value.flattened((1, 24))
    assert flat is not None
    assert (flat.shape, flat.parts) == ((1, math.prod(flat.parts)), (4, 2, 3))
