"""Hostile .pt2 files: graphs that call what is no operation, name what is no name, or nest and count beyond bounds."""

import json
from collections.abc import Callable
from typing import Any

from tests.hostile.archives import CODE, GRAPH, Archive, Kind
from tests.hostile.strings import NAMES, OPERATIONS

KINDS: dict[str, Kind] = {}


def _kind(change: Callable[[Any, list[Any]], None]) -> Callable[[Any, list[Any]], None]:
    """Put a change of the program and its nodes into the list."""
    KINDS[change.__name__] = _changed(change)
    return change


def _changed(change: Callable[[Any, list[Any]], None]) -> Kind:
    def apply(archive: Archive) -> None:
        with archive.json() as program:
            change(program, program["graph_module"]["graph"]["nodes"])

    return apply


def _text(change: Callable[[str], str]) -> Kind:
    """Return the kind that changes the graph as text."""

    def apply(archive: Archive) -> None:
        archive[GRAPH] = change(archive[GRAPH].decode()).encode("utf-8", "surrogatepass")

    return apply


def relu_of(nodes: list[Any]) -> Any:
    """Return the node that applies ReLU, which has one argument."""
    return next(node for node in nodes if node["target"].endswith("relu.default"))


_ARGUMENT_NAMES = {"torch.ops.aten.relu.default": ["self"], "torch.ops.aten.full.default": ["size", "fill_value"]}


def node(target: str, name: str, *arguments: object) -> dict[str, Any]:
    """Return a node as files spell it."""
    names = _ARGUMENT_NAMES.get(target, ["a", "b", "c", "d", "e", "f"])
    inputs = [{"name": each, "arg": argument, "kind": 1} for each, argument in zip(names, arguments, strict=False)]
    return {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": name}}], "metadata": {}}


# --- operations -------------------------------------------------------------------------------------------------------


def _calls(target: object, *arguments: object) -> Kind:
    def change(_: Any, nodes: list[Any]) -> None:
        relu = relu_of(nodes)
        relu["target"] = target
        if arguments:
            relu["inputs"] = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]

    return _changed(change)


for target in (*OPERATIONS, None, 5, ["torch.ops.aten.relu.default"], {"as_string": "os.system"}):
    KINDS[f"calls {target!r}"] = _calls(target)
_TEXT, _IMAGES = {"as_string": "touch executed"}, {"as_tensor": {"name": "images"}}
for target in ("os.system", "torch.ops.aten.from_file.default", "builtins.eval", "_operator.attrgetter"):
    KINDS[f"calls {target} with a word"] = _calls(target, _TEXT)
for name in ("getitem", "add", "sub", "mul", "mod", "floordiv", "eq"):
    KINDS[f"{name} of images and a word"] = _calls(f"_operator.{name}", _IMAGES, _TEXT)
    KINDS[f"{name} of words"] = _calls(f"_operator.{name}", _TEXT, {"as_string": "abc"})
    KINDS[f"{name} of a word and a number"] = _calls(f"_operator.{name}", _TEXT, {"as_int": 2**40})
    KINDS[f"{name} of a list and a number"] = _calls(f"_operator.{name}", {"as_ints": [0] * 99}, {"as_int": 2**40})
for name in ("math.ceil", "math.trunc", "torch.sym_float", "torch.sym_int", "torch.sym_not", "torch.sym_max"):
    KINDS[f"{name} of a word"] = _calls(name, _TEXT)
    KINDS[f"{name} of images"] = _calls(name, _IMAGES)


@_kind
def numbers_squared_again_and_again(program: Any, nodes: list[Any]) -> None:
    nodes.insert(0, node("_operator.add", "n0", {"as_int": 2**62}, {"as_int": 1}))
    for index in range(60):
        previous = {"as_sym_int": {"as_name": f"n{index}"}}
        nodes.insert(index + 1, node("_operator.mul", f"n{index + 1}", previous, previous))


@_kind
def sizes_squared_again_and_again(program: Any, nodes: list[Any]) -> None:
    size = node("torch.ops.aten.sym_size.int", "n0", _IMAGES, {"as_int": 0})
    size["inputs"][0]["name"], size["inputs"][1]["name"] = "self", "dim"
    nodes.insert(0, dict(size, outputs=[{"as_sym_int": {"as_name": "n0"}}]))
    for index in range(60):
        previous = {"as_sym_int": {"as_name": f"n{index}"}}
        square = node("_operator.mul", "", previous, previous)
        nodes.insert(index + 1, dict(square, outputs=[{"as_sym_int": {"as_name": f"n{index + 1}"}}]))


@_kind
def fewer_statistics_than_channels(program: Any, nodes: list[Any]) -> None:
    batch_norm = next(each for each in nodes if each["target"].endswith("batch_norm.default"))
    batch_norm["target"] = "torch.ops.aten._native_batch_norm_legit_no_training.default"
    batch_norm["inputs"] = [*batch_norm["inputs"][:5], *batch_norm["inputs"][6:8]]
    for index in range(1, 5):
        batch_norm["inputs"][index]["arg"] = {"as_tensor": {"name": "b_gain"}}
    name = batch_norm["outputs"][0]["as_tensor"]["name"]
    batch_norm["outputs"] = [{"as_tensor": {"name": each}} for each in (name, "mean_", "rstd_")]


@_kind
def divisions_by_zero(program: Any, nodes: list[Any]) -> None:
    nodes.insert(0, node("_operator.floordiv", "n", {"as_int": 1}, {"as_int": 0}))


@_kind
def a_tensor_beyond_all_memory(program: Any, nodes: list[Any]) -> None:
    full = node("torch.ops.aten.full.default", "n", {"as_ints": [2**20, 2**20, 2**10]}, {"as_float": 1.0})
    nodes.insert(0, full)


@_kind
def as_many_operations_as_fit(program: Any, nodes: list[Any]) -> None:
    relu = json.loads(json.dumps(node("torch.ops.aten.relu.default", "n", _IMAGES)))
    nodes += [dict(relu, outputs=[{"as_tensor": {"name": f"n{index}"}}]) for index in range(100_001)]


@_kind
def a_part_that_calls_the_system(program: Any, nodes: list[Any]) -> None:
    nodes.insert(0, _region([node("os.system", "inner", _TEXT)], "inner"))


def _region(nodes: list[Any], returned: str, target: str = "wrap_with_set_grad_enabled") -> dict[str, Any]:
    """Return a node that computes a part of the graph."""
    graph = {
        "inputs": [{"as_tensor": {"name": "images"}}],
        "outputs": [{"as_tensor": {"name": returned}}],
        "nodes": nodes,
        "tensor_values": {},
        "sym_int_values": {},
    }
    part = {"as_graph": {"name": CODE, "graph": graph}}
    return node(f"torch.ops.higher_order.{target}", "part", {"as_bool": False}, part, _IMAGES)


@_kind
def parts_within_parts(program: Any, nodes: list[Any]) -> None:
    inner = _region([node("torch.ops.aten.relu.default", "inner", _IMAGES)], "inner")
    for _ in range(40):
        inner = _region([inner], "part")
    nodes.insert(0, inner)


@_kind
def a_part_that_reads_what_is_outside(program: Any, nodes: list[Any]) -> None:
    relu = relu_of(nodes)["inputs"][0]["arg"]
    nodes.append(_region([node("torch.ops.aten.relu.default", "inner", relu)], "inner"))


for target in (
    "wrap_with_autocast",
    "cond",
    "while_loop",
    "invoke_subgraph",
    "strict_mode",
    "wrap_activation_checkpoint",
):
    KINDS[f"a part for {target}"] = _changed(
        lambda _, nodes, target=target: nodes.insert(0, _region([node("os.system", "x", _TEXT)], "x", target))
    )

# --- arguments --------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, object] = {
    "an object": {"as_custom_obj": {"name": "evil", "class_fqn": "__torch__.torch.classes.x"}},
    "an operation": {"as_operator": "os.system"},
    "a graph": {"as_graph": {"name": "x", "graph": {"nodes": [], "inputs": [], "outputs": []}}},
    "an expression": {"as_expr": {"expr_str": CODE}},
    "a symbol that is code": {"as_sym_int": {"as_name": CODE}},
    "a symbol that is a number": {"as_sym_int": {"as_int": 10**4000}},
    "a word that is code": {"as_string": CODE},
    "a word with a quote": {"as_string": "'+x+'"},
    "a long word": {"as_string": "x" * 10**6},
    "a word that is a list": {"as_string": [CODE]},
    "a graphics card": {"as_device": {"type": "cuda", "index": 99}},
    "no place": {"as_device": {"type": "meta", "index": None}},
    "a device that is code": {"as_device": {"type": CODE}},
    "an unknown type": {"as_scalar_type": 99},
    "a negative type": {"as_scalar_type": -1},
    "a type that is true": {"as_scalar_type": True},
    "a type that is a word": {"as_scalar_type": "torch.os"},
    "an unknown layout": {"as_layout": 3},
    "an unknown memory format": {"as_memory_format": 99},
    "infinity": {"as_float": "Infinity"},
    "not a number": {"as_float": "NaN"},
    "a number that is code": {"as_float": CODE},
    "a number that is a list": {"as_float": [1.0]},
    "too large a number": {"as_int": 2**63},
    "a number of 4000 digits": {"as_int": 10**4000},
    "a number that is a word": {"as_int": "5"},
    "numbers that are words": {"as_ints": ["a", "b"]},
    "numbers that are a word": {"as_ints": "12"},
    "numbers that are lists": {"as_ints": [[1]]},
    "an absent tensor": {"as_tensor": {"name": "absent"}},
    "itself": {"as_tensor": {"name": "relu"}},
    "what comes later": {"as_tensor": {"name": "linear"}},
    "a tensor that is a list": {"as_tensor": {"name": ["images"]}},
    "a tensor that is a dictionary": {"as_tensor": {"name": {"x": 1}}},
    "tensors within tensors": {"as_nested_tensors": [[{"name": "images"}]]},
    "complex numbers": {"as_complex": [1.0, 2.0]},
    "strings": {"as_strings": [CODE]},
    "optional tensors": {"as_optional_tensors": [{"as_tensor": {"name": "absent"}}]},
    "an optional object": {"as_optional_tensor": {"as_custom_obj": {"name": "x"}}},
    "optional tensors without end": {"as_optional_tensor": {"as_optional_tensor": {"as_optional_tensor": {}}}},
    "an unknown kind": {"as_code": CODE},
    "two kinds": {"as_int": 1, "as_string": "x"},
    "no kind": {},
    "a list": [1],
    "nothing": None,
    "a string": CODE,
    "a name of Python": {"__class__": {"__init__": {}}},
}
for title, argument in ARGUMENTS.items():
    KINDS[f"argument: {title}"] = _calls("torch.ops.aten.relu.default", argument)
    KINDS[f"second argument: {title}"] = _calls(
        "torch.ops.aten.mean.dim", {"as_tensor": {"name": "mul"}}, {"as_ints": [2, 3]}, {"as_bool": False}, argument
    )


def _relu(**changes: object) -> Kind:
    return _changed(lambda _, nodes: relu_of(nodes).update(changes))


for title, name in NAMES.items():
    argument = {"name": name, "arg": {"as_int": 1}, "kind": 2}
    KINDS[f"an argument called {title}"] = _changed(
        lambda _, nodes, argument=argument: relu_of(nodes)["inputs"].append(argument)
    )
    for value in ("images", "relu", "p_conv_weight"):
        spelled, other = f'"{value}"', json.dumps(name)
        KINDS[f"{value} called {title}"] = _text(lambda text, old=spelled, new=other: text.replace(old, new))
for number, outputs in enumerate(
    (
        *([], [{}], None, "relu", [{"as_tensor": {}}], [{"as_tensor": {"name": None}}], [{"as_none": True}]),
        [{"as_tensors": [{"name": f"n{index}"} for index in range(1000)]}],
        [{"as_tensor": {"name": "relu"}}, {"as_tensor": {"name": CODE}}],
        [{"as_tensor": {"name": "relu"}}, {"as_tensor": {"name": "relu"}}],
        [{"as_custom_obj": {"name": "relu"}}],
        [{"as_tensor": {"name": "images"}}],
    )
):
    KINDS[f"outputs {number} of an operation"] = _relu(outputs=outputs)
for number, inputs in enumerate(([], None, {}, "x", [{}], [None], [{"name": "self"}], [[]])):
    KINDS[f"inputs {number} of an operation"] = _relu(inputs=inputs)
KINDS["code beside an operation"] = _relu(
    name=CODE, metadata={"stack_trace": CODE, "nn_module_stack": CODE, "custom": CODE, "from_node": CODE}
)
KINDS["flags beside an operation"] = _relu(is_hop_single_tensor_return=CODE, eval=CODE)

# --- inputs, outputs and what stands beside the graph -----------------------------------------------------------------


def _signature(side: str, *specs: object) -> Kind:
    """Return the kind that adds inputs or outputs to a program."""
    return _changed(lambda program, _: program["graph_module"]["signature"][f"{side}_specs"].extend(specs))


for name in ("token", "custom_obj", "constant_input", "os.system", "__class__"):
    KINDS[f"an input of the kind {name}"] = _signature("input", {name: {"arg": {"name": "x"}, "name": CODE}})
    KINDS[f"an output of the kind {name}"] = _signature("output", {name: {"arg": {"name": "x"}, "name": CODE}})
for kind in ("parameter", "buffer", "tensor_constant"):
    for name in ("absent", "norm", CODE, "", None, ["conv.weight"]):
        spec = {kind: {"arg": {"name": "x"}, f"{kind}_name": name, "persistent": CODE}}
        KINDS[f"an input that is the {kind} {name!r}"] = _signature("input", spec)
KINDS["images twice"] = _signature("input", {"user_input": {"arg": {"as_tensor": {"name": "other"}}}})
for argument in ({"as_int": 5}, {"as_string": CODE}, {"as_none": True}, {"as_tensor": {"name": "absent"}}, None):
    KINDS[f"an input {argument}"] = _signature("input", {"user_input": {"arg": argument}})
    KINDS[f"an output {argument}"] = _signature("output", {"user_output": {"arg": argument}})
for title, sizes in {
    "huge": [{"as_expr": {}}, *[{"as_int": 2**40}] * 3],
    "large": [{"as_expr": {}}, *[{"as_int": 2**14}] * 3],
    "negative": [{"as_expr": {}}, *[{"as_int": -8}] * 3],
    "none": [],
    "code": [{"as_expr": {"expr_str": CODE}}, *[{"as_expr": {"expr_str": CODE}}] * 3],
    "many": [{"as_expr": {}}, *[{"as_int": 1}] * 1000],
    "of 4000 digits": [{"as_expr": {}}, *[{"as_int": 10**4000}] * 3],
    "fixed": [{"as_int": 8}] * 4,
    "words": ["s0", "a", "b", "c"],
}.items():
    KINDS[f"sizes of images that are {title}"] = _changed(
        lambda program, _, sizes=sizes: program["graph_module"]["graph"]["tensor_values"]["images"].update(sizes=sizes)
    )


def _beside(**values: object) -> Kind:
    return _changed(lambda program, _: program.update(values))


KINDS["constraints that are code"] = _beside(range_constraints={CODE: {"min_val": CODE, "max_val": CODE}})
KINDS["guards that are code"] = _beside(guards_code=[CODE])
KINDS["versions that are code"] = _beside(schema_version=CODE, torch_version=CODE, opset_version={"aten": CODE})
KINDS["verifiers that are code"] = _beside(verifiers=[CODE, "os.system"])
KINDS["no graph module"] = _beside(graph_module=None)


@_kind
def signatures_of_calls_that_are_code(program: Any, nodes: list[Any]) -> None:
    program["graph_module"]["module_call_graph"] = [{"fqn": CODE, "signature": {"in_spec": CODE, "out_spec": CODE}}]
    program["graph_module"]["treespec_namedtuple_fields"] = {"os.system": [CODE]}
    program["graph_module"]["metadata"] = {"code": CODE}


# --- JSON -------------------------------------------------------------------------------------------------------------

KINDS["nested lists"] = _text(lambda _: "[" * 100_000 + "]" * 100_000)
KINDS["nested dictionaries"] = _text(lambda _: '{"graph_module":' * 100_000 + "1" + "}" * 100_000)
KINDS["a number of 5000 digits"] = _text(lambda text: text.replace(": 0.1", f": {10**4000}{'0' * 1000}", 1))
KINDS["numbers that are none"] = _text(lambda text: text.replace("0.1", "NaN").replace("1e-05", "-Infinity"))
KINDS["a number beyond all bounds"] = _text(lambda text: text.replace("0.1", "1e999999"))
KINDS["keys that are given twice"] = _text(
    lambda text: text.replace('"target": "torch.ops.aten.relu.default"', '"target": "os.system", "target": "os.system"')
)
KINDS["keys given twice with an operation last"] = _text(
    lambda text: text.replace('"target": "torch', '"target": "os.system", "target": "torch')
)
KINDS["a mark of byte order"] = _text(lambda text: "\ufeff" + text)
KINDS["a surrogate"] = _text(lambda text: text.replace("relu", "\udc80"))
KINDS["nulls"] = _text(lambda text: text.replace("relu", "re\0lu"))
KINDS["escaped nulls"] = _text(lambda text: text.replace("relu", "re\\u0000lu"))
KINDS["a list"] = _text(lambda text: f"[{text}]")
KINDS["a word"] = _text(lambda _: json.dumps(CODE))
KINDS["nothing"] = _text(lambda _: "")
KINDS["code"] = _text(lambda _: CODE)
KINDS["something behind it"] = _text(lambda text: text + CODE)
KINDS["half of it"] = _text(lambda text: text[: len(text) // 2])
