"""Random changes of valid inputs: of JSON values, of files that hold JSON and tensors, of bytes.

Everything follows from a `random.Random`, so an input is found again by its seed.
"""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Change = Callable[[bytes, Random], bytes]

_MARK = "\x01{}\x01"  # stands in a value for raw text that no JSON value says


def _nested(rng: Random) -> str:
    levels = rng.choice([30, 65, 500, 5_000, 100_000])
    if rng.random() < 0.5:
        return "[" * levels + "]" * levels
    return '{"a":' * levels + "1" + "}" * levels


# Raw JSON texts that take a value's place.
_RAW: tuple[Callable[[Random], str], ...] = (
    *(
        (lambda _, text=text: text)
        for text in (
            "null",
            "true",
            "false",
            "0",
            "1",
            "-1",
            "2",
            "0.5",
            "-0.0",
            "1e30",
            "1e999",
            "-1e999",
            "NaN",
            "Infinity",
            "9223372036854775807",
            "9223372036854775808",
            "-9223372036854775809",
            "4611686018427387904",
            "1000000000",
            "1" * 5000,
            '""',
            '"x"',
            '"\\ud800"',
            '"\\u0000"',
            '"\\n"',
            '"../../etc/passwd"',
            '"/etc/passwd"',
            '"*"',
            '"%s%n{0}{{"',
            '"\\u202e\\u2066"',
            '"' + "x" * 100_000 + '"',
            "[]",
            "{}",
            "[[]]",
            "[null]",
            '[""]',
            "[-1]",
            "[0, 0]",
            '{"": 1}',
            '{"a": 1, "a": 2}',
            '{"\\ud800": 1}',
        )
    ),
    _nested,
    lambda rng: str(rng.randint(-(2**66), 2**66)),
    lambda rng: str(rng.randint(-9, 99)),
    lambda rng: repr(rng.gauss(0, 10 ** rng.randint(-3, 30))),
)


def json_value(content: bytes, rng: Random) -> bytes:
    """One to three changes inside a JSON value, at random places; seldom of its text instead."""
    if rng.random() < 0.15:
        return raw_bytes(content, rng)
    return changed_value(json.loads(content), rng).encode("utf-8", "surrogatepass")


def changed_value(value: Any, rng: Random) -> str:
    """The text of a JSON value with one to three changes inside."""
    raws: list[str] = []
    holder = [value]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _change_once(holder, rng, raws)
    text = json.dumps(holder[0], indent=rng.choice([None, None, 2]))
    for number, raw in enumerate(raws):
        text = text.replace(json.dumps(_MARK.format(number)), raw)
    return text


def _change_once(holder: list[Any], rng: Random, raws: list[str]) -> None:
    """Changes one random place below `holder`."""
    parent, key = _place(holder, rng)
    kind = rng.random()
    if kind < 0.65:
        raws.append(rng.choice(_RAW)(rng))
        parent[key] = _MARK.format(len(raws) - 1)
    elif kind < 0.8 and parent is not holder:
        del parent[key]
    elif kind < 0.88:
        other, place = _place(holder, rng)
        parent[key] = json.loads(json.dumps(other[place]))
    elif isinstance(parent, dict):
        name = rng.choice([f"{key}x", "", "__class__", "format", f"{key}\ud800", str(rng.random())])
        parent[name] = parent.pop(key) if rng.random() < 0.5 else parent[key]
    elif parent is not holder:
        parent.append(parent[key])


def _place(holder: list[Any], rng: Random) -> tuple[Any, Any]:
    """A container below `holder` and a key of it: each level ends the descent by chance."""
    parent, key = holder, 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    return parent, key


def raw_bytes(content: bytes, rng: Random) -> bytes:
    """A few changes of a file's bytes: flips, cuts, doublings, insertions."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 4, 64, 4096]))
        kind = rng.random()
        if kind < 0.4 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.55:
            del data[at:end]
        elif kind < 0.7:
            data[at:at] = data[at:end]
        elif kind < 0.85:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
        elif kind < 0.95:
            del data[at:]
        else:
            data[at:end] = bytes(end - at)
    return bytes(data)


def text_lines(content: bytes, rng: Random) -> bytes:
    """Changes of a file of lines: of the JSON value of one, or of the bytes."""
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    if rng.random() < 0.8 and lines[number].strip():
        lines[number] = json_value(lines[number], rng).replace(b"\n", b" ")
        return b"\n".join(lines)
    return raw_bytes(content, rng)


def container(content: bytes, rng: Random) -> bytes:
    """Changes of a safetensors file: in its header, in JSON inside its metadata, or its bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return raw_bytes(content, rng)
    if kind < 0.4 and data:
        data = _numbers(data, rng)
    metadata = header.get("__metadata__", {})
    inside = [name for name, value in metadata.items() if value[:1] in ("{", "[")]
    if inside and 0.4 < kind < 0.8:
        name = rng.choice(inside)
        metadata[name] = changed_value(json.loads(metadata[name]), rng)
    text = json.dumps(header) if kind < 0.8 else changed_value(header, rng)
    raw = text.encode("utf-8", "surrogatepass")
    wrong = rng.random() < 0.05
    return struct.pack("<Q", len(raw) + (rng.choice([-1, 1, 2**40]) if wrong else 0)) + raw + data


def _numbers(data: bytes, rng: Random) -> bytes:
    """One 8-byte number of the data replaced: by another of them, or by one no sum is."""
    at = 8 * rng.randrange(max(1, len(data) // 8))
    other = 8 * rng.randrange(max(1, len(data) // 8))
    odd = [struct.pack("<d", x) for x in (float("nan"), float("inf"), -1.0, 1e300)]
    odd += [struct.pack("<q", n) for n in (-1, 0, 1, 2**62, -(2**63))]
    return data[:at] + rng.choice([*odd, data[other : other + 8]]) + data[at + 8 :]
