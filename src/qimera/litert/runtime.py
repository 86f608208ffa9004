"""The bytes of a LiteRT file -> its results, on XNNPACK or the built-in kernels, and which kernels run what."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qimera.litert.remarks import held_back

VERSION = version("ai-edge-litert")

_WEIGHTED = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "BATCH_MATMUL": 1}
"""Operations with a weight, and which of their inputs it is."""

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


@dataclass(frozen=True)
class Kernels:
    """Who runs the operations of a file where XNNPACK is used."""

    partitions: int
    """Parts of the graph that XNNPACK runs as one."""

    outside: tuple[str, ...]
    """Operations that it leaves to the built-in kernels, in order."""


class Runtime:
    """A file, ready to run on one thread, on XNNPACK as on phones or on the built-in kernels alone."""

    def __init__(self, content: bytes, *, xnnpack: bool = True, num_threads: int = 1) -> None:
        resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with held_back():  # its errors are exceptions
            self._interpreter = Interpreter(
                model_content=content, num_threads=num_threads, experimental_op_resolver_type=resolver
            )
            self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        signature = self._interpreter.get_signature_runner()
        self._names = list(signature.get_output_details())
        self._outputs = [signature.get_output_details()[name] for name in self._names]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of a batch, (batch, height, width, channel), run one image after the other."""
        return np.concatenate([self.outputs(image[None])["logits"] for image in images])

    def outputs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Return every output for one image by its name; integer logits as the numbers that they stand for."""
        self._interpreter.set_tensor(self._input["index"], image)
        self._interpreter.invoke()
        found = {}
        for name, details in zip(self._names, self._outputs, strict=True):
            value = self._interpreter.get_tensor(details["index"])
            scale, zero_point = details["quantization"]
            found[name] = (value.astype(np.float32) - zero_point) * scale if name == "logits" and scale else value
        return found

    def again(self) -> None:
        """Compute once more for the last image, without what it takes to bring it here."""
        self._interpreter.invoke()

    def kernels(self) -> Kernels:
        """Return which operations are in partitions of XNNPACK: those between a partition's inputs and outputs."""
        operations = self._interpreter._get_ops_details()
        partitions = [each for each in operations if each["op_name"] == "DELEGATE"]
        others = [each for each in operations if each["op_name"] != "DELEGATE"]
        writers = {tensor: each for each in others for tensor in each["outputs"]}
        inside: set[int] = set()
        for partition in partitions:
            entering, ahead = set(partition["inputs"]), list(partition["outputs"])
            while ahead:
                tensor = ahead.pop()
                if tensor in writers and tensor not in entering and writers[tensor]["index"] not in inside:
                    inside.add(writers[tensor]["index"])
                    ahead += list(writers[tensor]["inputs"])
        return Kernels(len(partitions), tuple(each["op_name"] for each in others if each["index"] not in inside))


def weights_in(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the integers of every weight in a file."""
    model = schema.Model.GetRootAs(content)
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        for index in range(graph.OperatorsLength()):
            operator = graph.Operators(index)
            place = _WEIGHTED.get(_NAMES[model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()])
            if place is not None:
                tensor = graph.Tensors(operator.Inputs(place))
                buffer = model.Buffers(tensor.Buffer())
                if tensor.Type() == schema.TensorType.INT8 and buffer.DataLength():
                    yield tensor.Name().decode(), buffer.DataAsNumpy().view(np.int8)


def operations_in(content: bytes) -> list[str]:
    """Return the names of the operations that a file needs, each once."""
    model = schema.Model.GetRootAs(content)
    codes = (model.OperatorCodes(index).BuiltinCode() for index in range(model.OperatorCodesLength()))
    return sorted({_NAMES[code] for code in codes})
