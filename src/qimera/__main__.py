"""``python -m qimera``, as ``torchrun`` and other launchers start it."""

from qimera.cli.app import main

main()
