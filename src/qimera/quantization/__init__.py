"""Grids of integers, how tensors are brought onto them, and which tensors of a graph are."""

import logging

_REMARKS = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
"""Loggers that speak when torchao is imported: of kernels for other machines, and of torchao's own deprecations."""

_levels = [logger.level for logger in _REMARKS]
for _logger in _REMARKS:
    _logger.setLevel(logging.ERROR)
import torchao  # noqa: E402, F401

for _logger, _level in zip(_REMARKS, _levels, strict=True):
    _logger.setLevel(_level)
