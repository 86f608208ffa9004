import numpy as np
import pytest
import torch

from qimera.errors import ConfigError
from qimera.machine.seeds import Stream, check_seed, generator_for
from qimera.mixed_precision.allocation import allocate_bits
from qimera.mixed_precision.sensitivity import measure_sensitivity
from qimera.pipeline import synthesize
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


def test_the_same_place_gives_the_same_numbers() -> None:
    one, two = (torch.rand(4, generator=generator_for(3, Stream.PARTS, 5)) for _ in range(2))
    assert torch.equal(one, two)


def test_every_place_of_every_seed_has_numbers_of_its_own() -> None:
    places = [(place, *rest) for place in Stream for rest in [(), (0,), (1,), (7,), (0, 0), (1, 0), (0, 1)]]
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


@pytest.mark.parametrize("seed", [1.5, "3", None])
def test_what_is_no_whole_number_is_refused_as_a_seed(seed: object) -> None:
    with pytest.raises(ConfigError, match=rf"seed: expected a whole number from 0 to \d+, given {seed!r}"):
        check_seed(seed)


def test_a_seed_that_numpy_made_is_a_plain_number() -> None:
    assert type(check_seed(np.int64(3))) is int


def test_sensitivity_and_bits_for_a_budget_refuse_such_seeds_too(teacher: Teacher, bank: SampleBank) -> None:
    with pytest.raises(ConfigError, match="seed: expected a whole number"):
        measure_sensitivity(teacher, bank, seed=1 << 64)
    with pytest.raises(ConfigError, match="seed: expected a whole number"):
        allocate_bits(teacher, bank, "size=0.2", seed=1 << 64)
