"""How the fuzz changes an input: bytes, cells, values of JSON and YAML, chunks of PNG, headers of safetensors."""

import csv
import hashlib
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

from fuzz_seeds import Files, json_of

# Changes the files of a seed; those that it leaves out are deleted.
Mutation = Callable[[random.Random, Files], Files]

# What parsers have fallen for.
NASTY_TEXTS = ["", " ", "\0", "\x1b[2J", "\ufeff", "\u202e", "<image>", "ERROR: timeout", "nan", "-0", "1e999", "٣"]
NASTY_TEXTS += ["9" * 30, "9" * 5000, "-1", "3.0", "0x10", "=1+1", '"', "'", "a\nb", "\r", "é" * 300, "a" * 140_000]
NASTY_TEXTS += ["../../etc/passwd", "/dev/zero", "a" * 5000, "{}", "[]", "null", "%s%n", "😀", "test", "train"]
NASTY_VALUES: list[Any] = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308, 1e-320]
NASTY_VALUES += [float("nan"), float("inf"), "", "a", "\0", "a" * 5000, "../x", [], [[]], {}, {"a": 1}, [0], [-1, 2]]
NASTY_VALUES += [[None], ["a", "b"], 50_000, 1_000_000]


# Bytes of any file --------------------------------------------------------------------------------------------------


def flip(rng: random.Random, content: bytes, first: int = 0) -> bytes:
    """One to four bits, behind the first so many bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if len(changed) > first:
            changed[rng.randrange(first, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spell(rng: random.Random, content: bytes) -> bytes:
    """One or two letters or digits of a text, for others that are printable."""
    changed = bytearray(content)
    for place in _letters(rng, content, rng.randint(1, 2)):
        changed[place] = rng.choice([rng.randrange(32, 127), *b"0123456789aeTx"])
    return bytes(changed)


def flip_letters(rng: random.Random, content: bytes) -> bytes:
    """A bit of one or two letters or digits."""
    changed = bytearray(content)
    for place in _letters(rng, content, rng.randint(1, 2)):
        changed[place] ^= 1 << rng.choice([0, 1, 2, 3, 4, 5, 6, 7])
    return bytes(changed)


def insert_text(rng: random.Random, content: bytes) -> bytes:
    """What parsers have fallen for, behind a letter or digit."""
    for place in _letters(rng, content, 1):
        piece = rng.choice([*NASTY_TEXTS, "0", "e5", "_", "é"]).encode()
        content = content[: place + 1] + piece + content[place + 1 :]
    return content


def _letters(rng: random.Random, content: bytes, count: int) -> list[int]:
    places = [place for place, byte in enumerate(content) if chr(byte).isalnum() and byte < 128]
    return rng.sample(places, min(count, len(places)))


def cut(rng: random.Random, content: bytes, least: int = 0) -> bytes:
    """The beginning, of at least so many bytes."""
    return content[: rng.randint(min(least, len(content)), len(content))]


def repeat(rng: random.Random, content: bytes, first: int = 0) -> bytes:
    """A piece once more, or missing."""
    start = rng.randint(min(first, len(content)), len(content))
    end = min(len(content), start + rng.randint(1, 64))
    middle = content[start:end] * rng.choice([0, 2, 3, 20])
    return content[:start] + middle + content[end:]


def insert(rng: random.Random, content: bytes, first: int = 0) -> bytes:
    """What parsers have fallen for, somewhere."""
    start = rng.randint(min(first, len(content)), len(content))
    piece = rng.choice([rng.randbytes(rng.randint(1, 16)), rng.choice(NASTY_TEXTS).encode()])
    return content[:start] + piece + content[start:]


def of_one_file(change: Callable[[random.Random, bytes], bytes], pattern: str = "") -> Mutation:
    """Changes one of the files whose names match."""

    def mutate(rng: random.Random, files: Files) -> Files:
        name = rng.choice([name for name in sorted(files) if re.search(pattern, name)])
        return files | {name: change(rng, files[name])}

    return mutate


def without_one(pattern: str = "") -> Mutation:
    """Deletes or empties one of the files whose names match."""

    def mutate(rng: random.Random, files: Files) -> Files:
        name = rng.choice([name for name in sorted(files) if re.search(pattern, name)])
        rest = {other: content for other, content in files.items() if other != name}
        return rest if rng.random() < 0.7 else rest | {name: b""}

    return mutate


# CSV -----------------------------------------------------------------------------------------------------------------


def csv_cells(rng: random.Random, files: Files) -> Files:
    """One to three cells, quoted as they have to be."""
    return _csv_changed(rng, files, lambda table: _change_cells(rng, table))


def _change_cells(rng: random.Random, table: list[list[str]]) -> None:
    for _ in range(rng.randint(1, 3)):
        row = 0 if rng.random() < 0.1 else rng.randrange(1, len(table))
        column = rng.randrange(min(6, len(table[row])))
        table[row][column] = rng.choice([*NASTY_TEXTS, str(rng.randrange(12)), "train", "test"])


def csv_rows(rng: random.Random, files: Files) -> Files:
    """A row twice, somewhere else, missing, longer, or shorter."""

    def change(table: list[list[str]]) -> None:
        row = rng.randrange(1, len(table))
        kind = rng.choice(["twice", "move", "drop", "longer", "shorter", "blank", "swap"])
        if kind == "twice":
            table.insert(row, list(table[row]))
        elif kind == "move":
            table.append(table.pop(row))
        elif kind == "drop":
            table.pop(row)
        elif kind == "longer":
            table[row] += [rng.choice(NASTY_TEXTS)] * rng.randint(1, 3)
        elif kind == "shorter":
            table[row] = table[row][: rng.randrange(len(table[row]))]
        elif kind == "blank":
            table[row] = []
        else:
            table[row][2], table[row][3] = table[row][3], table[row][2]

    return _csv_changed(rng, files, change)


def csv_header(rng: random.Random, files: Files) -> Files:
    """A name of a column: another one, missing with its cells, twice, or white space around it."""

    def change(table: list[list[str]]) -> None:
        column = rng.randrange(len(table[0]))
        kind = rng.choice(["rename", "drop", "add", "space", "case"])
        if kind == "rename":
            table[0][column] = rng.choice(["Split", "T1", "S1", "Class_Label", "Q1", *NASTY_TEXTS])
        elif kind == "drop":
            for row in table:
                del row[column]
        elif kind == "add":
            name = rng.choice(["Class_Label", "S1", "T1", "Split", "line", "pair", "Q6", *NASTY_TEXTS])
            for number, row in enumerate(table):
                row.append(name if number == 0 else rng.choice(["cat", "dog", "train", "object", *NASTY_TEXTS]))
        elif kind == "space":
            table[0][column] = f" {table[0][column]}\t"
        else:
            table[0][column] = table[0][column].swapcase()

    return _csv_changed(rng, files, change)


def _csv_changed(rng: random.Random, files: Files, change: Callable[[list[list[str]]], None]) -> Files:
    [(name, content)] = files.items()
    table = list(csv.reader(io.StringIO(content.decode(), newline="")))
    change(table)
    text = io.StringIO()
    csv.writer(text, lineterminator=rng.choice(["\n", "\r\n"])).writerows(table)
    return {name: text.getvalue().encode("utf-8", "surrogatepass")}


def csv_lines(rng: random.Random, files: Files) -> Files:
    """Lines that do not end, or columns without number; and line ends of other kinds."""
    [(name, content)] = files.items()
    kind = rng.choice(["ends", "long", "wide", "open", "bom", "utf16", "separator"])
    if kind == "ends":
        return {name: content.replace(b"\n", rng.choice([b"\r", b"\r\r\n", b"\n\n", b"\x0b", b"\xe2\x80\xa8"]))}
    if kind == "long":
        return {name: content + b"7,train," + b"a" * rng.choice([1000, 131_072, 131_073, 300_000]) + b",b" + b"," * 8}
    if kind == "wide":
        return {name: b"\n".join(line + b",x" * rng.choice([500, 5000]) for line in content.split(b"\n"))}
    if kind == "open":
        place = rng.randrange(len(content))
        return {name: content[:place] + b'"' + content[place:]}
    if kind == "bom":
        return {name: rng.choice([b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe"]) + content}
    if kind == "utf16":
        return {name: content.decode().encode(rng.choice(["utf-16", "utf-32", "utf-7"]))}
    return {name: content.replace(b",", rng.choice([b";", b"\t", b"|"]))}


# Pictures ------------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk with the check sum that it has to have."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_chunks(rng: random.Random, files: Files) -> Files:
    """
    A PNG with a chunk that is another one, more than there was, or missing; all check sums are right. A small one
    where the picture is none.
    """
    chunks = _png_chunks(files["picture"])
    if not chunks:
        chunks = _png_chunks(_SMALL_PNG)
    place = rng.randrange(1, len(chunks))
    kind, body = chunks[place]
    choice = rng.choice(["flip", "size", "text", "profile", "exif", "exif", "drop", "twice"])
    if choice == "flip":
        chunks[place] = (kind, flip(rng, body))
    elif choice == "size":
        width, height = (rng.choice([0, 1, 7, 36, 9000, 100_000, 2**31 - 1, 2**32 - 1]) for _ in range(2))
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
    elif choice == "text":
        bomb = zlib.compress(b"a" * rng.choice([10, 1_000_000, 3_000_000]))
        body = rng.choice([b"a\0\0" + bomb, b"Comment\0" + b"x" * 2000, b"\0\0"])
        chunks.insert(1, (rng.choice([b"zTXt", b"tEXt", b"iTXt"]), body))
    elif choice == "profile":
        chunks.insert(1, (b"iCCP", b"icc\0\0" + zlib.compress(rng.randbytes(rng.choice([4, 200, 100_000])))))
    elif choice == "exif":
        chunks.insert(1, (b"eXIf", random_exif(rng)))
    elif choice == "drop":
        chunks.pop(place)
    else:
        chunks.insert(place, chunks[place])
    return {"picture": _SMALL_PNG[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)}


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while content[:4] == b"\x89PNG" and place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += length + 12
    return chunks


_SMALL_PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    png_chunk(kind, body)
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 3, 2, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + bytes(range(9)) for _ in range(2)))),
        (b"IEND", b""),
    )
)


def random_exif(rng: random.Random) -> bytes:
    """EXIF data with tags of any type, number and place of their values."""
    end = rng.choice(["<", ">"])
    tags = [274, 274, 34665, 34853, 305, 37510, rng.randrange(65536)]
    entries = b"".join(
        struct.pack(
            f"{end}HHII",
            rng.choice(tags),
            rng.choice([*range(14), 129, 65535]),
            rng.choice([0, 1, 2, 1000, 2**32 - 1]),
            rng.choice([0, 1, 3, 6, 8, 9, 26, 2**32 - 1, rng.randrange(2**32)]),
        )
        for _ in range(rng.randint(1, 5))
    )
    head = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(f"{end}I", rng.choice([8, 8, 8, 4, 2**31]))
    return head + struct.pack(f"{end}H", rng.choice([1, 3, 5, 65535])) + entries + rng.randbytes(12)


def jpeg_exif(rng: random.Random, files: Files) -> Files:
    """A JPEG with other EXIF data; of another picture its first kilobytes with a bit flipped."""
    content = files["picture"]
    if content[:2] != b"\xff\xd8":
        return {"picture": flip(rng, content, 64)}
    body = b"Exif\0\0" + random_exif(rng)
    return {"picture": content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]}


def gray_values(rng: random.Random, files: Files) -> Files:
    """A TIFF of floating point grays with NaN, infinity or the largest floats among them; others are cut."""
    content = files["picture"]
    if content[:2] != b"II" or len(content) < 3000:
        return {"picture": cut(rng, content, len(content) // 2)}
    value = rng.choice([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-40])
    place = 8 + 4 * rng.randrange(24 * 36)
    return {"picture": content[:place] + struct.pack("<f", value) + content[place + 4 :]}


# JSON and YAML -------------------------------------------------------------------------------------------------------


def json_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """The same structure with one of its values replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        choice = rng.random()
        if choice < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if choice < 0.15:
            return value | {rng.choice(["", "a", "model_type", "\0", key.upper()]): rng.choice(NASTY_VALUES)}
        return value | {key: json_value(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], json_value(rng, value[place], depth + 1), *value[place + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, value * 2, -value, str(value), float(value), value * 1000])
    return rng.choice(NASTY_VALUES)


def of_json(pattern: str) -> Mutation:
    """One to three values of one of the JSON files whose names match."""

    def change(rng: random.Random, content: bytes) -> bytes:
        value = json_of(content)
        for _ in range(rng.randint(1, 3)):
            value = json_value(rng, value)
        return json.dumps(value).encode()

    return of_one_file(change, pattern)


def json_form(rng: random.Random, content: bytes) -> bytes:
    """JSON of another form: nested without end, a name twice, no object, NaN, or a number of thousands of digits."""
    text = content.decode()
    kinds = [
        text.replace("{", '{"a": ' + "[" * 100_000 + "]" * 100_000 + ", ", 1),
        text.replace("{", '{"hidden_size": 3, "num_image_tokens": 9, ', 1),
        f"[{text}]",
        text.replace("{", '{"initializer_range": NaN, "other": -Infinity, ', 1),
        text.replace("{", '{"other": ' + "9" * 5000 + ", ", 1),
        text + text,
        "\ufeff" + text,
        text.replace('": ', '" : ').replace(",", " ,\n\n"),
        text.replace("{", '{"' + "k" * 100_000 + '": 1, ', 1),
        text.replace("{", '{"other": "\\ud800", ', 1),
    ]
    return rng.choice(kinds).encode("utf-8")


_YAML_VALUES = ["", "~", "yes", "off", "0", "-1", "1", "3", "1e-3", "1e400", ".nan", "nan", "inf", ".inf", "9" * 30]
_YAML_VALUES += ["9" * 5000, "[]", "[1, 2]", "[a, [b, [c]]]", "{}", "{a: 1}", "{a: 2020-01-01}", "!!binary aGk=", "*x"]
_YAML_VALUES += ["&x [1]", "!!python/name:os.system ''", '"a\\0b"', "'x y'", "|\n  two\n  lines", "<<", "0o17", "1:30"]
_YAML_VALUES += ["2020-01-01", "a" * 5000, "{? [1] : 2}", "{a: !!python/name:os.system x}", "synthetic", "true"]
_YAML_VALUES += ["[" * 300 + "]" * 300, "- a", '"\\uD800"', "none", "steps", "best", "8", "0.5"]


def of_yaml_values(options: list[str]) -> Mutation:
    """A line with another value, or one more line of an option among `options`."""

    def change(rng: random.Random, content: bytes) -> bytes:
        lines = content.decode().splitlines()
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(lines))
            if rng.random() < 0.4:
                name = rng.choice(options)
                lines = [line for line in lines if not line.startswith(f"{name}:")] + [f"{name}: {_yaml(rng)}"]
            else:
                lines[place] = f"{lines[place].partition(':')[0]}: {_yaml(rng)}"
        return "\n".join(lines).encode("utf-8", "replace")

    return of_one_file(change)


def _yaml(rng: random.Random) -> str:
    return rng.choice([*_YAML_VALUES, str(rng.randrange(-5, 300)), f"{rng.uniform(-1, 10):.3g}"])


def yaml_form(rng: random.Random, content: bytes) -> bytes:
    """YAML that grows or nests, several documents, a key twice, or no mapping; often one that is sound."""
    text = content.decode()
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
    )
    first = text.splitlines()[rng.randrange(1, 5)]
    lines = text.splitlines()
    rng.shuffle(lines)
    kinds = [
        text + laughs,
        text + f"hidden_sizes: {'[' * 5000}{']' * 5000}\n",
        text + f"lr_scheduler_kwargs: {'{a: ' * 3000}1{'}' * 3000}\n",
        text + "depths: &d [*d]\n",
        text + f"---\n{text}",
        text + first + "\n",
        "- " + text.replace("\n", "\n  "),
        "%YAML 1.1\n---\n" + text,
        "\n".join(lines),
        text.replace("_", "-"),
        text.replace(": ", ":   ").replace("\n", "  # a remark\n"),
        text + f"{'k' * 5000}: 1\n",
        text + "# " + "x" * 100_000,
    ]
    return rng.choice(kinds).encode()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def resealed(mutation: Mutation) -> Mutation:
    """The same, with a record that knows the changed files, so that what they hold is looked at."""

    def mutate(rng: random.Random, files: Files) -> Files:
        changed = dict(mutation(rng, files))
        for name in [name for name in changed if name.endswith("/sigphi_run.json")]:
            folder = name.rpartition("/")[0]
            try:
                record = json_of(changed[name])
            except ValueError:  # it is what was changed
                continue
            record["files"] = {
                inner: [len(changed[f"{folder}/{inner}"]), hashlib.sha256(changed[f"{folder}/{inner}"]).hexdigest()]
                for inner in record["files"]
                if f"{folder}/{inner}" in changed
            }
            changed[name] = json.dumps(record).encode()
        return changed

    return mutate


def renamed(rng: random.Random, files: Files) -> Files:
    """A checkpoint under another name."""
    new = rng.choice(["checkpoint-3", "checkpoint-0", "checkpoint-99999999999", "checkpoint-٣", "checkpoint-4.bak"])
    return {name.replace("checkpoint-4/", f"{new}/"): content for name, content in files.items()}


# Weights -------------------------------------------------------------------------------------------------------------


def safetensors_header(rng: random.Random, content: bytes) -> bytes:
    """A file of weights whose header names other types, shapes, places, or none at all."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    kind = rng.choice(["shape", "type", "place", "rename", "drop", "add", "length", "swap"])
    if kind == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([[], [-1], [2**62, 4], [0], shape[::-1], [*shape, 1], [10**12] * 4, [1.5]])
    elif kind == "type":
        header[name]["dtype"] = rng.choice(["F16", "F64", "I8", "BOOL", "X", "", 3, None, "BF16"])
    elif kind == "place":
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**63], [-4, 4], [4, 0], [1, 5], [], ["a", "b"]])
    elif kind == "rename":
        header[rng.choice(["a", f"{name}.b", "\0", "../x"])] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "add":
        header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\0\0\0\0"
    elif kind == "swap":
        other = rng.choice(sorted(set(header) - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    sizes = [0, 1, 2**63, 2**64 - 1, 2**40, 100_000_000, len(text) - 1, len(text) + 1]
    size = rng.choice(sizes) if kind == "length" else len(text)
    return struct.pack("<Q", size) + text + body


__all__ = [
    "Mutation",
    "csv_cells",
    "csv_header",
    "csv_lines",
    "csv_rows",
    "cut",
    "flip",
    "gray_values",
    "flip_letters",
    "insert",
    "insert_text",
    "jpeg_exif",
    "json_form",
    "of_json",
    "of_one_file",
    "of_yaml_values",
    "png_chunk",
    "png_chunks",
    "renamed",
    "repeat",
    "resealed",
    "safetensors_header",
    "spell",
    "without_one",
    "yaml_form",
]
