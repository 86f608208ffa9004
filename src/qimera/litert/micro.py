"""A student -> a LiteRT file for microcontrollers, compared with the student on tflite-micro, and the file as C."""

import re
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qimera.errors import ConfigError, UnsupportedModelError
from qimera.export.comparison import (
    MIN_AGREEMENT,
    Verification,
    check_agreement,
    compare,
    logits_of,
    multiplying,
    refuse_lowest_weights,
    sample_pixels,
)
from qimera.litert.export import logits_levels
from qimera.litert.remarks import held_back
from qimera.machine.files import place_for, replacing
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank

_MAX_ARENA = 1 << 28
_BYTES_PER_LINE = 16

_WORDS_OF_CPP = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t "
    "class compl concept const consteval constexpr constinit const_cast continue co_await co_return co_yield "
    "decltype default delete do double dynamic_cast else enum explicit export extern false float for friend "
    "goto if inline int long main mutable namespace new noexcept not not_eq nullptr operator or or_eq private "
    "protected public register reinterpret_cast requires return short signed sizeof static static_assert "
    "static_cast struct switch template this thread_local throw true try typedef typeid typename union "
    "unsigned using virtual void volatile wchar_t while xor xor_eq"
)
"""No array can be called by one of these."""


def export_tflm(
    student: Student,
    path: Path | str,
    samples: SampleBank | None = None,
    *,
    include_preprocessing: bool = False,
    integer_logits: bool = False,
    min_agreement: float = MIN_AGREEMENT,
) -> Verification:
    """Write ``student`` for microcontrollers, and return how the file compares on the kernels of tflite-micro.

    The file is as that of ``export_litert``, except that weights of up to 4 bits are stored as int4, and that the layer
    that returns the logits computes in floating point unless they are integers. Beside it lie a C++ source with the
    same bytes, and its header, which says how much memory the interpreter wants, and which operations. Students with
    target ``tflm`` are repeated bit for bit. These kernels round twice, which may cost other students their accuracy.

    Args:
        student: Of scheme ``hardware``.
        path: Where the file goes; ``.cc`` and ``.h`` go beside it.
        samples: What the file is compared on; without them, on noise.
        include_preprocessing: Read uint8 ``pixels`` (1, height, width, channel), 0 darkest and 255 brightest, and
            normalise them inside.
        integer_logits: Return int8 logits, on a grid from the least to the largest that ``samples`` get.
        min_agreement: Percent of samples that student and file must put into the same class.

    Raises:
        ConfigError: ai-edge-litert or tflite-micro is not installed, integer logits have no samples, or the file would
            take the place of its own ``.cc`` or ``.h``, or has a name that C++ cannot include.
        UnsupportedModelError: something in the student has no counterpart in LiteRT, or no kernel in tflite-micro.
        VerificationError: the file disagrees with the student.
    """
    missing = [name for name in ("ai_edge_litert", "tflite_micro") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format tflm: needs {' and '.join(missing)}; pip install 'qimera[tflm]'")
    path = Path(path)
    if path.suffix in (".cc", ".h"):
        raise ConfigError(f"{path}: its .cc and .h go beside the file; call the file {path.stem}.tflite")
    if not path.name.isprintable() or not set('"\\').isdisjoint(path.name):
        raise ConfigError(f"{path}: C++ includes no file with such a character in its name; call it model.tflite")
    for place in _places(path):
        place_for(place)
    from qimera.litert.runtime import operations_in, weights_in
    from qimera.lowering.model import lower

    levels = logits_levels(student, samples) if integer_logits else None
    lowered = lower(student, include_preprocessing=include_preprocessing, logits_levels=levels, is_micro=True)
    content = lowered.content()
    refuse_lowest_weights(weights_in(content))
    pixels = sample_pixels(student, samples)
    images = student.input_spec.normalize(pixels)
    expected = logits_of(student, images).numpy()
    if levels is not None:  # of classes that integers cannot tell apart the file may pick either
        expected = levels.rounded(expected)
    source = images if lowered.input_name == "input" else pixels
    runtime = MicroRuntime(content)
    actual = runtime(np.ascontiguousarray(source.permute(0, 2, 3, 1).numpy()))
    names = list(multiplying(student).values())
    float_layers = [name for name in names if name in lowered.writer.float_layers]
    found = compare(f"tflite-micro {version('tflite-micro')}", expected, actual, len(names), float_layers)
    advice = "" if student.settings.target == "tflm" else "quantize with --target tflm"
    check_agreement(found, len(pixels), min_agreement, lambda: advice)
    found = replace(found, arena_bytes=runtime.arena_bytes())
    _write(path, content, found.arena_bytes or 0, operations_in(content))
    return Verification(len(names), len(content), len(pixels), (found,))


class MicroRuntime:
    """A file, ready to run on the reference kernels of tflite-micro."""

    def __init__(self, content: bytes, *, arena_size: int = _MAX_ARENA) -> None:
        from tflite_micro import runtime

        with held_back() as said:
            try:
                self._interpreter = runtime.Interpreter.from_bytes(content, arena_size=arena_size)
            except RuntimeError as error:
                raise _no_kernel(said(), error) from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, (batch, height, width, channel), run one image after the other."""
        return np.concatenate([self._run(image[None]) for image in images])

    def _run(self, image: np.ndarray) -> np.ndarray:
        self._interpreter.set_input(image, 0)
        with held_back() as said:
            try:
                self._interpreter.invoke()
            except RuntimeError as error:  # some kernels look at their tensors only when they run
                raise _no_kernel(said(), error) from error
        logits = np.asarray(self._interpreter.get_output(0))
        if logits.dtype == np.float32:
            return logits
        details = self._interpreter.get_output_details(0)["quantization_parameters"]
        steps: np.ndarray = (logits.astype(np.float32) - details["zero_points"][0]) * details["scales"][0]
        return steps

    def arena_bytes(self) -> int:
        """Return the memory that the interpreter has taken, with pointers as long as here."""
        with held_back() as said:
            self._interpreter.print_allocations()
            (total,) = re.findall(r"Arena allocation total (\d+) bytes", "\n".join(said()))
        return int(total)


def _no_kernel(lines: list[str], error: RuntimeError) -> UnsupportedModelError:
    reason = next(iter(lines), str(error))
    return UnsupportedModelError(
        f"tflite-micro cannot run part of the model: {reason}; export to litert, which has more kernels"
    )


def _places(path: Path) -> tuple[Path, Path, Path]:
    """Return where the file, its source and its header go."""
    return path, path.with_suffix(".cc"), path.with_suffix(".h")


def _write(path: Path, content: bytes, arena_bytes: int, operations: list[str]) -> None:
    """Write the file, and the same as C++ with a header."""
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)  # not every compiler takes other letters
    name = f"_{name}" if name[:1].isdigit() or name in _WORDS_OF_CPP.split() else name
    guard = f"{name.upper()}_H_"
    header = [
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        f"// The model of {path.name}, for the interpreter of LiteRT for Microcontrollers.",
        f"// Its operations: {', '.join(operations)}.",
        f"extern const unsigned char {name}[];",
        f"constexpr unsigned int {name}_size = {len(content)};",
        "// What the interpreter takes of its arena where pointers have 64 bits; it is less where they have 32.",
        f"constexpr unsigned int {name}_arena_size = {arena_bytes};",
        "",
        f"#endif  // {guard}",
    ]
    parts = (content[start : start + _BYTES_PER_LINE] for start in range(0, len(content), _BYTES_PER_LINE))
    rows = ["    " + ", ".join(f"0x{byte:02x}" for byte in part) + "," for part in parts]
    source = [f'#include "{path.stem}.h"', "", f"alignas(16) const unsigned char {name}[] = {{", *rows, "};"]
    with ExitStack() as together:  # all are written before the first one gets its name
        place, source_place, header_place = (together.enter_context(replacing(each)) for each in _places(path))
        header_place.write_text("\n".join(header) + "\n", encoding="utf-8")
        source_place.write_text("\n".join(source) + "\n", encoding="utf-8")
        place.write_bytes(content)
