"""Hostile .pt2 files: what the list of tensors says of them, their bytes and their names."""

from tests.hostile.archives import CODE, CONSTANTS, WEIGHTS, Archive, Kind, pickled, replaced
from tests.hostile.strings import DOTTED, NAMES

KINDS: dict[str, Kind] = {}


def _configured(*keys: str, to: object, tensor: str = "conv.weight", file: str = WEIGHTS) -> Kind:
    """Return the kind that changes what an archive says of a tensor."""

    def change(archive: Archive) -> None:
        with archive.json(file) as listing:
            place = listing["config"][tensor]
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = to

    return change


_SIZES = {
    "huge": [{"as_int": 2**40}] * 4,
    "that overflow": [{"as_int": 2**62}, {"as_int": 2**62}, {"as_int": 0}, {"as_int": 4}],
    "beyond 64 bits": [{"as_int": 10**4000}] * 4,
    "negative": [{"as_int": -4}, {"as_int": -3}, {"as_int": 3}, {"as_int": 3}],
    "too many": [{"as_int": 1}] * 3000,
    "fewer than strides": [{"as_int": 108}],
    "fractions": [{"as_int": 1.5}] * 4,
    "words": [{"as_int": "4"}] * 4,
    "truths": [{"as_int": True}] * 4,
    "symbols": [{"as_expr": {"expr_str": CODE, "hint": None}}] * 4,
    "names": [{"as_name": CODE}] * 4,
    "one more": [{"as_int": 5}, {"as_int": 3}, {"as_int": 3}, {"as_int": 3}],
    "no list": {"as_int": 4},
}
for name, sizes in _SIZES.items():
    KINDS[f"sizes {name}"] = _configured("tensor_meta", "sizes", to=sizes)
    KINDS[f"strides {name}"] = _configured("tensor_meta", "strides", to=sizes)
for value in (1, 2**40, 2**63, -1, -(2**63), 10**4000, 1.5, "0", True, None):
    KINDS[f"storage offset {value!s:.20}"] = _configured("tensor_meta", "storage_offset", to={"as_int": value})
KINDS["storage offset that is code"] = _configured("tensor_meta", "storage_offset", to={"as_expr": {"expr_str": CODE}})
KINDS["strides of zero"] = _configured("tensor_meta", "strides", to=[{"as_int": 0}] * 4)
for value in (0, 9, 11, 12, 14, 28, 99, -1, 10**30, True, 7.0, "7", None, [7], {"as_int": 7}):
    KINDS[f"dtype {value!r:.20}"] = _configured("tensor_meta", "dtype", to=value)
for value in (0, 1, 2, 5, 6, 99, "7", None):
    KINDS[f"layout {value!r}"] = _configured("tensor_meta", "layout", to=value)
for value in ("cuda", "meta", "privateuseone", "cpu:99", CODE, "", None, 5):
    KINDS[f"device {value!r:.20}"] = _configured("tensor_meta", "device", to={"type": value, "index": 99})
for value in (True, 1, "false", None, [], {}):
    KINDS[f"use_pickle {value!r}"] = _configured("use_pickle", to=value)
for value in (
    *("opaque_obj_0", "custom_obj_0", "tensor_0", "weight_", "weight_0\n", "weight_\u0663", "weight_00", "weight_-1"),
    *("../weights/weight_0", "/etc/passwd", "weight_0/../weight_1", "weight_0\0", "weight_" + "9" * 5000, ""),
    *("model.pt", None, 5, ["weight_0"], {}),
):
    KINDS[f"path_name {value!r:.40}"] = _configured("path_name", to=value)


def _constant(path_name: str, *, use_pickle: bool) -> Kind:
    """Return the kind that adds a constant, which is a pickle."""

    def change(archive: Archive) -> None:
        with archive.json(WEIGHTS) as listing:
            entry = dict(listing["config"]["conv.weight"], path_name=path_name, use_pickle=use_pickle)
        with archive.json(CONSTANTS) as listing:
            listing["config"]["evil"] = entry
        archive[f"data/constants/{path_name}"] = pickled()

    return change


for name in ("opaque_obj_0", "custom_obj_0", "tensor_9", "tensor_9.pt", "opaque_obj_/../tensor_9", "script_obj_0"):
    KINDS[f"a constant in {name}"] = _constant(name, use_pickle=False)
    KINDS[f"a pickled constant in {name}"] = _constant(name, use_pickle=True)
for name, content in {"few": b"1234", "odd": bytes(431), "many": bytes(10_000), "no": b""}.items():
    KINDS[f"{name} bytes of a weight"] = replaced("data/weights/weight_0", content)
for name, content in {
    "not numbers": b"\xff" * 432,
    "a pickle": pickled(),
    "another archive": b"PK\x05\x06" * 108,
}.items():
    KINDS[f"bytes of a weight that are {name}"] = replaced("data/weights/weight_0", content)


def _named(name: str, tensor: str = "conv.weight") -> Kind:
    """Return the kind that calls a tensor by another name everywhere."""

    def change(archive: Archive) -> None:
        with archive.json(WEIGHTS) as listing:
            listing["config"] = {name if key == tensor else key: each for key, each in listing["config"].items()}
        with archive.json() as program:
            for spec in program["graph_module"]["signature"]["input_specs"]:
                for given in spec.values():
                    if given.get("parameter_name") == tensor:
                        given["parameter_name"] = name

    return change


for title, name in {**NAMES, **{f"dotted: {title}": name for title, name in DOTTED.items()}}.items():
    KINDS[f"tensor called {title}"] = _named(name)


def a_name_for_many_weights(archive: Archive) -> None:
    with archive.json(WEIGHTS) as listing:
        listing["config"] |= {f"more.x{index}": listing["config"]["conv.weight"] for index in range(3000)}


def a_list_of_weights_that_is_no_list(archive: Archive) -> None:
    archive[WEIGHTS] = b'{"config": [["conv.weight", "weight_0"]]}'


KINDS |= {each.__name__: each for each in (a_name_for_many_weights, a_list_of_weights_that_is_no_list)}
