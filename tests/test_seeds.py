import torch

from qimera.seeds import Place, generator_for


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
