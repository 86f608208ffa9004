import pytest
import torch

from qimera.errors import ConfigError
from qimera.pipeline import synthesize
from qimera.seeds import Place, generator_for
from qimera.teacher import Teacher


def test_the_same_place_gives_the_same_numbers() -> None:
    one, two = (torch.rand(4, generator=generator_for(3, Place.PARTS, 5)) for _ in range(2))
    assert torch.equal(one, two)


def test_every_place_of_every_seed_has_numbers_of_its_own() -> None:
    places = [(place, *rest) for place in Place for rest in [(), (0,), (1,), (7,), (0, 0), (1, 0), (0, 1)]]
    drawn = {
        (seed, place): float(torch.rand(1, generator=generator_for(seed, *place)))
        for seed in (0, 1, 2**40)
        for place in places
    }
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1 << 64])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_made(teacher: Teacher, seed: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"seed: expected a whole number from 0 to 9223372036854775807, given {seed}"
    ):
        synthesize(teacher, seed=seed)
