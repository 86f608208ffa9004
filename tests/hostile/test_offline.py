"""A whole job without a network."""

import socket
from pathlib import Path

import pytest

from qimera.config.settings import DirectSettings, SynthesisSettings
from tests.command_line import qimera, tiny_settings


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("asked for the network")


def test_from_weights_to_a_verified_file_no_socket_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    synthesis = SynthesisSettings(num_optimized=16, num_held_out=8, direct=DirectSettings(num_steps=2, batch_size=8))
    tiny_settings(synthesis=synthesis).save(tmp_path / "settings.json")
    for command in (
        ("inspect", "mnist_cnn"),
        ("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run"),
        ("export", tmp_path / "run"),
        ("report", tmp_path / "run"),
        ("compare", tmp_path / "run"),
    ):
        done = qimera(*command)
        assert done.exit_code == 0, (command, done.stderr)
