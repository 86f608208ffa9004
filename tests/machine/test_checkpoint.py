import os
import signal
from pathlib import Path

import pytest
import torch

from qimera.errors import PeerError
from qimera.machine import checkpoint
from qimera.machine.checkpoint import Checkpoint, Checkpoints


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoint:
    return Checkpoints(tmp_path / "kept", "a teacher", 3).of("student")


def test_a_state_comes_back_as_it_was(tmp_path: Path, kept: Checkpoint) -> None:
    state = {"step": 3, "weights": {"a": torch.arange(4.0)}, "lowest": float("inf"), "rates": [(1, 0.5), None]}
    kept.save(state)
    found = Checkpoints(tmp_path / "kept", "a teacher", 3).of("student").load()
    assert torch.equal(found["weights"].pop("a"), state["weights"].pop("a"))
    assert found == state


def test_nothing_is_there_before_the_first_state_and_after_the_last(tmp_path: Path, kept: Checkpoint) -> None:
    assert kept.load() == {}
    assert not (tmp_path / "kept").exists()
    kept.save({"step": 1})
    Checkpoints(tmp_path / "kept").forget()
    assert kept.load() == {}
    assert not (tmp_path / "kept").exists()


def test_a_state_of_something_else_is_not_read(
    tmp_path: Path, kept: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    kept.save({"step": 1})
    assert Checkpoints(tmp_path / "kept", "another teacher", 3).of("student").load() == {}
    assert "student.pt: of other settings or another model; starting anew" in caplog.text
    assert Checkpoints(tmp_path / "kept", "a teacher", 3).of("generator").load() == {}


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_damaged_state_is_not_read(
    tmp_path: Path, kept: Checkpoint, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept.save({"step": 1, "weight": torch.zeros(100)})
    file = tmp_path / "kept" / "student.pt"
    file.write_bytes(file.read_bytes()[:keep])
    assert kept.load() == {}
    assert "student.pt: damaged" in caplog.text


def test_no_state_executes_code(tmp_path: Path, kept: Checkpoint) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "kept").mkdir()
    torch.save({"owner": "", "state": Harmful()}, tmp_path / "kept" / "student.pt")
    assert kept.load() == {}
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_without_a_place_keeps_nothing() -> None:
    nowhere = Checkpoint()
    with nowhere.guarding():
        nowhere.after_step(lambda: pytest.fail("asked for a state"))
        nowhere.save({"step": 1})
    assert nowhere.load() == {}


def test_states_are_saved_when_it_is_time(kept: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.after_step(lambda: pytest.fail("asked for a state"))
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    kept.after_step(lambda: {"step": 5})
    assert kept.load() == {"step": 5}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_end_of_the_step(
    kept: Checkpoint, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    steps = []

    def loop() -> None:
        with kept.guarding():
            for step in range(1, 4):
                if step == 2:
                    os.kill(os.getpid(), number)
                steps.append(step)
                kept.after_step(lambda: {"step": steps[-1]})

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps == [1, 2]
    assert kept.load() == {"step": 2}
    assert signal.getsignal(number) is before
    assert "saving after this step; once more to stop at once" in caplog.text


def test_the_second_interruption_acts_at_once(kept: Checkpoint) -> None:
    def interrupt_twice() -> None:
        with kept.guarding():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert kept.load() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(kept: Checkpoint, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with kept.guarding():
            os.kill(os.getpid(), number)
            kept.after_step(lambda: pytest.fail("asked for a state"))
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_an_interruption_after_the_last_step_loses_nothing(kept: Checkpoint) -> None:
    with kept.guarding():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        kept.save({"step": 9})
    assert kept.load() == {"step": 9}


def test_an_interrupted_process_goes_on_until_the_main_one_has_saved_and_left(
    kept: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it left first, the main process would lack it in the step that ends with the state."""
    monkeypatch.setattr(checkpoint, "is_main", lambda: False)
    steps = []

    def loop() -> None:
        with kept.guarding():
            os.kill(os.getpid(), signal.SIGINT)
            for step in range(3):
                kept.after_step(lambda: pytest.fail("asked for a state"))
                steps.append(step)
            raise PeerError("another process of this run has ended")

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert steps == [0, 1, 2]


def test_a_lost_process_is_no_interruption(kept: Checkpoint) -> None:
    with pytest.raises(PeerError), kept.guarding():
        raise PeerError("another process of this run has ended")
