"""Nothing that is read may run: hostile files are refused with a message, or turn out to be harmless."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from qimera.runs.directory import RunDirectory
from qimera.teacher.exported_programs import read_program
from qimera.teacher.libraries import _import
from qimera.teacher.teacher import Teacher
from tests.command_line import qimera, said, tiny_settings
from tests.forked import Starter, said_by
from tests.hostile.audit_sources import strange_code
from tests.networks import NETWORKS, SPEC, random_network
from tests.runs.test_directory import summary

Outcomes = Callable[..., list[dict[str, object]]]
AMOUNTS = ["default", pytest.param("slow", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def outcomes(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What a program that reads hostile files finds, one kind of file after another."""

    def outcomes(*arguments: object) -> list[dict[str, object]]:
        words = list(map(str, arguments))
        said = said_by(starter, tmp_path_factory.mktemp("hostile"), "tests.side_by_side:program", words)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    return outcomes


@pytest.fixture(scope="module")
def few(outcomes: Outcomes) -> list[dict[str, object]]:
    """What became of some archives, and of some teachers."""
    return outcomes("tests.hostile.reading", "archives", 11, 0, 60, "teachers", 6, 0, 60)


def check(found: dict[str, object]) -> None:
    assert not found["faults"], "\n".join(found["faults"])


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_nothing_in_an_archive_runs(request: pytest.FixtureRequest, outcomes: Outcomes, amount: str) -> None:
    whole = ("tests.hostile.reading", "archives", 1, 1000, 10_000)
    found = request.getfixturevalue("few")[0] if amount == "default" else outcomes(*whole)[0]
    check(found)
    assert found["refused"] > found["read"] > 10


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_nothing_in_a_saved_teacher_runs(request: pytest.FixtureRequest, outcomes: Outcomes, amount: str) -> None:
    whole = ("tests.hostile.reading", "teachers", 1, 1000, 10_000)
    found = request.getfixturevalue("few")[1] if amount == "default" else outcomes(*whole)[0]
    check(found)
    assert found["refused"] > found["read"] > 5


def test_nothing_in_other_files_runs(outcomes: Outcomes) -> None:
    check(outcomes("tests.hostile.others")[-1])


# --- run directories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "export", "compare", "report"])
def test_commands_refuse_the_hostile_teacher_of_a_run(tmp_path: Path, command: str, teacher: Teacher) -> None:
    run = RunDirectory.start(tmp_path / "run", tiny_settings())
    run.finish(summary())
    teacher.save(run.teacher_file)
    content = run.teacher_file.read_bytes()
    run.teacher_file.write_bytes(content.replace(b"aten.relu.default", b"posix.system_____"[:17]))
    arguments = ["--data", str(tmp_path)] if command == "evaluate" else []
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.png").touch()
    before = sorted(tmp_path.rglob("*"))
    result = qimera(command, run.path, *arguments)
    if command == "compare":  # reads no network
        assert result.exit_code == 0
    else:
        assert result.exit_code == 2
        assert "posix.system" in said(result)
    assert sorted(tmp_path.rglob("*")) == before


# --- good archives ----------------------------------------------------------------------------------------------------


def check_that_it_is_read(model: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    program = torch.export.export(model, (torch.zeros(2, *shape),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(program, path)
    network, images = read_program(path), torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert strange_code(network.code) == ""
    with torch.no_grad():
        assert torch.equal(network(images), model(images))


@pytest.mark.parametrize("name", ["residual", "many edges", "transposed convolution"])
def test_good_archives_give_the_same_logits(tmp_path: Path, name: str) -> None:
    assert name in NETWORKS
    check_that_it_is_read(random_network(name), tmp_path / "good.pt2", SPEC.shape)


TIMM = ["resnet18", "mobilenetv3_small_050", "efficientnet_b0", "densenet121", "vit_tiny_patch16_224"]
TIMM += ["convnextv2_atto", "regnetx_002", "mobilenetv2_050"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TIMM, "torchvision:googlenet", "torchvision:shufflenet_v2_x0_5"])
def test_good_archives_of_known_architectures_give_the_same_logits(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    library, _, own = name.rpartition(":")
    if library:
        model = _import("torchvision.models").get_model(own, **({"init_weights": False} if own == "googlenet" else {}))
    else:
        model = _import("timm").create_model(own, **({"img_size": 64} if own.startswith("vit") else {}))
    check_that_it_is_read(model.eval(), tmp_path / "good.pt2", (3, 64, 64))
