"""Trained image classifiers -> low-bit integer models, without any data."""

import lazy_loader

__version__ = "0.2.0"

# Imported when first used: torchao takes seconds, and `qimera --help` needs neither it nor torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
