"""Random changes of archives and of saved teachers: of their JSON, their entries and their bytes."""

import copy
import json
import random
from typing import Any

from tests.hostile.archives import CONSTANTS, GRAPH, WEIGHTS, Archive
from tests.hostile.strings import DOTTED, NAMES, OPERATIONS, STRANGE
from tests.hostile.teachers import TeacherFile

_STRINGS = [*(each for each in NAMES.values() if len(each) < 1000), *DOTTED.values(), *OPERATIONS]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value, as what it lies in and its key."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else list(range(len(each)))
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys if isinstance(each[key], dict | list)]
    return found


def change_json(value: Any, chance: random.Random) -> None:
    """Change a value in one to three places."""
    for _ in range(chance.choice([1, 1, 2, 3])):
        places = _places(value)
        if not places:
            return
        owner, key = chance.choice(places)
        other, from_key = chance.choice(places)
        match chance.choice(["strange", "string", "same kind", "copy", "drop", "add", "more"]):
            case "strange":
                owner[key] = copy.deepcopy(chance.choice(STRANGE))
            case "string":
                strings = [place for place in places if isinstance(place[0][place[1]], str)]
                owner, key = chance.choice(strings or places)
                owner[key] = chance.choice(_STRINGS)
            case "same kind":
                same = [place for place in places if type(place[0][place[1]]) is type(owner[key])]
                other, from_key = chance.choice(same)
                owner[key] = copy.deepcopy(other[from_key])
            case "copy":
                owner[key] = copy.deepcopy(other[from_key])
            case "drop":
                del owner[key]
            case "add" if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(other[from_key]))
            case "add":
                owner[chance.choice(_STRINGS)] = copy.deepcopy(other[from_key])
            case _ if isinstance(owner[key], int | float):
                owner[key] = chance.choice([owner[key] + 1, -owner[key], owner[key] * 2**20, owner[key] * 1000])


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes with some bits turned over."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8]) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def mutate_archive(archive: Archive, chance: random.Random) -> None:
    """Change an archive in a random way."""
    number = chance.randrange(len(archive.entries))
    name, content = archive.entries[number]
    match chance.choice(["graph"] * 6 + ["weights"] * 3 + ["name", "entry", "bytes", "swap", "twice", "file"]):
        case "graph":
            with archive.json(GRAPH) as program:
                change_json(program, chance)
        case "weights":
            with archive.json(chance.choice([WEIGHTS, WEIGHTS, CONSTANTS])) as listing:
                change_json(listing, chance)
        case "name":
            archive.entries[number] = (
                chance.choice([*_STRINGS, GRAPH, WEIGHTS]).replace("\udc80", "x") or "x",
                content,
            )
        case "entry":
            del archive.entries[number]
        case "bytes":
            archive.entries[number] = (name, flipped(content, chance))
        case "swap":
            archive.entries[number] = (name, chance.choice(archive.entries)[1])
        case "twice":
            archive.entries.append((name, chance.choice(archive.entries)[1]))
        case "file":
            archive.finish.append(lambda whole: flipped(whole, chance))


def mutate_teacher(file: TeacherFile, chance: random.Random) -> None:
    """Change the file of a saved teacher in a random way."""
    match chance.choice(["graph"] * 8 + ["header", "header", "bytes", "text"]):
        case "graph":
            change_json(file.graph, chance)
        case "header":
            change_json(file.header, chance)
        case "bytes":
            file.raw = flipped(file.content(), chance)
        case "text":
            text = json.dumps(file.graph)
            place = chance.randrange(len(text))
            file.graph = text[:place] + chance.choice(_STRINGS) + text[place + chance.choice([0, 1, 8]) :]
