"""A teacher, bit widths and samples -> the student: its graph, its first integers, and the sums of integer kernels."""

import qimera.quantization  # noqa: F401  # imports torchao before anything else does, without its remarks
