from pathlib import Path

import pytest

from qimera.errors import ConfigError
from qimera.machine.metrics import Metrics
from qimera.machine.progress import silent

LINE = '{"part": "bank", "stage": "direct", "step": 3, "total": 9, "seconds": 1.5}\n'


@pytest.mark.parametrize(
    "line",
    [
        '{"part": "bank", "stage": "direct", "step": 3, "total": 9, "seconds": "long"}',
        '{"part": "bank", "stage": "direct", "step": null, "total": 9, "seconds": 1}',
        '{"part": [1], "stage": "direct", "step": 3, "total": 9, "seconds": 1}',
        '{"part": "bank", "stage": {}, "step": 3, "total": 9, "seconds": 1}',
        "[" * 100_000,
        '{"part": "bank", "sta',
    ],
)
def test_a_line_that_is_none_is_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{LINE}{line}\n{LINE}")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert len(metrics.lines()) == 2
    assert metrics.seconds("bank") == 1.5


def test_a_link_does_not_lead_the_metrics_of_a_run_into_another_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "other")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="is a link, and nothing is written outside"), metrics.recording("a", silent):
        pass
    assert (tmp_path / "other").read_text() == "precious"
