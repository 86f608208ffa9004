"""How a step may be computed; chosen in settings, which need no torch."""

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "never", "always"]
