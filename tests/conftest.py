"""How the tests run: in what order, with how many examples, and what is loaded by processes that run some."""

import gc
from pathlib import Path

import hypothesis
import pytest

# No deadline: the first example of a test pays for whatever PyTorch loads.
hypothesis.settings.register_profile("quick", deadline=None, max_examples=8)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)  # that of `make test-all`
hypothesis.settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """Load PyTorch and what is made with it, but not where `make test` only hands tests out to other processes."""
    if getattr(config.option, "dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")


LONGEST = (
    "whole/test_any_classifier.py",
    "report/test_page.py",
    "export/test_onnx.py",
    "machine/test_distributed.py",
    "whole/test_interruption.py",
    "whole/test_pipeline.py",
    "runs/test_execution.py",
    "machine/test_acceleration.py",
    "training/test_memory.py",
)
"""Files of more than ten seconds. They come first, so that the processes end at nearly the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by files alone: those that take longest, then the others as they were found."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Look no more at what was imported for all tests."""
    gc.freeze()
