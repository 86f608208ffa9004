"""How a step may be computed, and for which runtime; chosen in settings, which need no torch."""

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "never", "always"]
Target = Literal["onnxruntime", "openvino", "inductor", "xnnpack", "litert", "litert-builtin", "tflm"]
