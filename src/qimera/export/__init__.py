"""A student -> files that other runtimes run, each compared with the student before it is handed over."""

from importlib.util import find_spec

from qimera.errors import ConfigError

_MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
if _MISSING:
    raise ConfigError(f"export: needs {', '.join(_MISSING)}; pip install 'qimera[onnx]'")
