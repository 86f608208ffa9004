"""What several files of command-line tests share; each file has its own."""

from pathlib import Path

import numpy as np
import pytest

from tests.command_line import run_tiny_settings


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny_settings(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of noise: enough to count on."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    images = generator.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 10)
    return path
