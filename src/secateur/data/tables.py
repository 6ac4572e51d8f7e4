"""Parquet files in the layout of the Hugging Face hub, from a folder or fetched from the hub itself."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.data.cache import Where, cached, fingerprint
from secateur.data.dataset import Dataset, Split
from secateur.data.images import VALIDATION, assemble, decode, require

LABELS = ("label", "labels", "fine_label", "target", "class", "y")
IMAGES = ("image", "img")
_PART = re.compile(rf"(?:^|[-_.])(train|test|{'|'.join(VALIDATION)})(?=$|[-_.\d])")


def find_parts(folder: Path) -> dict[str, list[Path]]:
    """Parquet files below ``folder`` by part: ``train``, ``test``, ``validation``.

    The part is a word of the file's name (``train-00000-of-00001.parquet``) or else its folder's name. Files
    without such a word count as ``train`` when no file has one.

    Raises:
        DataError: when the training files lie in several folders (configurations of one data set).
    """
    parts: dict[str, list[Path]] = {}
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    for file in files:
        word = _PART.search(file.stem.lower()) or _PART.fullmatch(file.parent.name.lower())
        part = "" if word is None else "validation" if word[1] in VALIDATION else word[1]
        parts.setdefault(part, []).append(file)
    rest = parts.pop("", [])
    parts = parts or ({"train": rest} if rest else {})
    parts = {part: parts[part] for part in ("train", "test", "validation") if part in parts}
    for part, found in parts.items():
        places = sorted({str(file.parent) for file in found})
        if len(places) > 1:
            raise DataError(
                f"{folder}: {part} files lie in several folders ({', '.join(places)}); name one of them instead."
            )
    return parts


def load_parquet(name: str, folder: Path, where: Where, size: int | None = None) -> Dataset:
    """A folder of parquet files, or one file.

    A column of pictures (a struct with ``bytes``, or binary) makes an image set; otherwise all numeric
    columns (or lists of numbers) but the label become float32 features, in the order of the file. The label
    column is called label, labels, fine_label, target, class or y, or is the only integer or text column;
    text labels are numbered in sorted order of the training part.

    Args:
        name: name of the data set.
        folder: the folder, or one parquet file.
        where: whether to use the cache.
        size: height and width to resize pictures to, in pixels.

    Raises:
        DataError: no training file, a damaged file, no usable columns, or empty cells.
    """
    parts = find_parts(folder)
    if "train" not in parts:
        raise DataError(
            f"{folder}: no training part; name its files train*.parquet (found {', '.join(parts) or 'nothing'})."
        )
    files = [file for part in parts.values() for file in part]

    def build() -> Dataset:
        require("pyarrow", "reading parquet files")
        tables = {part: _read_files(found) for part, found in parts.items()}
        return from_tables(name, tables, {p: _brief(f) for p, f in parts.items()}, size)

    return cached(name, ["parquet", name, size, fingerprint(files)], build, where.cache)


def load_hub_set(name: str, hub: str, where: Where, size: int | None = None) -> Dataset:
    """A named set from ``<data folder>/<name>``, or else from the Hugging Face hub.

    Raises:
        DataError: when it is neither there nor can be fetched; the message says both ways.
    """
    root = where.root()
    folder = root / name if root is not None else None
    if folder is not None and {"train", "test"} <= find_parts(folder).keys():
        return load_parquet(name, folder, where, size)
    needed = ("train.parquet", "test.parquet")
    if importlib.util.find_spec("datasets") is None:
        more = f"; or `pip install secateur[hub]`, with which {hub!r} is fetched from the Hugging Face hub"
        raise where.absent(name, name, needed, more)
    try:
        parts = _fetch(hub)
    except Exception as error:  # the library raises many kinds for no network, no such set, no room
        brief = (str(error).splitlines() or [""])[0]
        failed = f"fetching {hub!r} from the Hugging Face hub failed ({type(error).__name__}: {brief})"
        more = f"; or mend the network: {failed}"
        raise where.absent(name, name, needed, more) from error
    marks = sorted((part, split._fingerprint) for part, split in parts.items())

    def build() -> Dataset:
        tables = {part: _arrow(split) for part, split in parts.items()}
        return from_tables(name, tables, {part: f"{hub} {part}" for part in tables}, size)

    return cached(name, ["hub", hub, size, marks], build, where.cache)


def from_tables(name: str, tables: dict[str, Any], files: dict[str, str], size: int | None = None) -> Dataset:
    """A data set from Arrow tables by part.

    Args:
        name: name of the data set.
        tables: Arrow tables of the parts ``train`` and, where present, ``test`` and ``validation``.
        files: what to call each part in an error.
        size: height and width to resize pictures to.

    Raises:
        DataError: see :func:`load_parquet`.
    """
    train = tables["train"]
    picture = _picture_column(train.schema)
    label = _label_column(train.schema, picture, files["train"])
    for part, table in tables.items():
        missing = set(train.column_names) - set(table.column_names)
        if missing:
            raise DataError(f"{files[part]}: the column {sorted(missing)[0]!r} of the training part is missing.")
        if table.num_rows == 0:
            raise DataError(f"{files[part]}: the {part} part has no rows; give it at least one.")
    labels, classes = _labels(tables, label, files, _class_names(train.schema, label))
    if picture is not None:
        inputs = _pictures(tables, picture, files, size)
    else:
        inputs = {part: _features(table, train.column_names, label, files[part]) for part, table in tables.items()}
    parts = {part: Split(inputs[part], labels[part]) for part in tables}
    return assemble(name, parts, classes, "image" if picture is not None else "features")


def _read_files(files: Sequence[Path]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            # a file object, so that folder names like "split=train" add no columns
            with file.open("rb") as opened:
                tables.append(pq.read_table(opened))
        except (pa.ArrowException, OSError, ValueError) as error:
            brief = str(error).splitlines()[0]
            raise DataError(f"{file}: damaged or not a parquet file ({brief}); fetch it again.") from error
        if tables[-1].schema.names != tables[0].schema.names:
            raise DataError(
                f"{file}: its columns {tables[-1].schema.names} are not those of {files[0]}: {tables[0].schema.names}."
            )
    return pa.concat_tables(tables, promote_options="permissive")


def _brief(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} ... {files[-1].name}"


def _fetch(hub: str) -> dict[str, Any]:
    datasets = importlib.import_module("datasets")
    return {part: datasets.load_dataset(hub, split=part) for part in ("train", "test")}


def _arrow(split: Any) -> Any:
    """The Arrow table of a hub split, pictures still encoded, with the class names in its metadata."""
    table = split.with_format("arrow")[:]
    features = {"info": {"features": split.features.to_dict()}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


def _picture_column(schema: Any) -> str | None:
    import pyarrow as pa

    def holds(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds(field.type)]
    return next((name for name in IMAGES if name in found), found[0] if found else None)


def _label_column(schema: Any, picture: str | None, where: str) -> str:
    import pyarrow as pa

    for name in LABELS:
        if name in schema.names and name != picture:
            return name
    found = [f.name for f in schema if pa.types.is_integer(f.type) or _is_text(f.type)]
    if len(found) != 1:
        raise DataError(f"{where}: no label column among {', '.join(schema.names)}; call it 'label'.")
    return found[0]


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Names kept in the metadata of the hub's files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    # the hub's YAML keeps {"0": "cat", ...} in older files
    listed = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
    return tuple(map(str, listed))


def _labels(
    tables: dict[str, Any], label: str, files: dict[str, str], names: tuple[str, ...] | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    import pyarrow as pa

    columns = {part: _whole(table, label, files[part]) for part, table in tables.items()}
    if all(_is_text(column.type) for column in columns.values()):
        names = names or tuple(sorted(set(columns["train"].to_pylist())))
        numbers = {name: i for i, name in enumerate(names)}
        for part, column in columns.items():
            odd = sorted(set(column.to_pylist()) - numbers.keys())
            if odd:
                raise DataError(f"{files[part]}: the label {odd[0]!r} is not among the classes ({', '.join(names)}).")
        return {part: torch.tensor([numbers[v] for v in c.to_pylist()]) for part, c in columns.items()}, names
    if not all(pa.types.is_integer(column.type) for column in columns.values()):
        raise DataError(
            f"{files['train']}: the label column {label!r} is {columns['train'].type}; labels must be integers or text."
        )
    labels = {part: torch.from_numpy(column.to_numpy().astype(np.int64)) for part, column in columns.items()}
    top = max(int(y.max()) for y in labels.values())
    return labels, names or tuple(map(str, range(top + 1)))


def _pictures(tables: dict[str, Any], name: str, files: dict[str, str], size: int | None) -> dict[str, Tensor]:
    import pyarrow as pa

    encoded: list[bytes] = []
    marks: list[str] = []
    for part, table in tables.items():
        column = _whole(table, name, files[part])
        column = column.field("bytes") if pa.types.is_struct(column.type) else column
        if column.null_count:
            raise DataError(
                f"{files[part]}: {column.null_count} of {len(column)} pictures have no bytes in {name!r}; embed them."
            )
        encoded += column.to_pylist()
        marks += [part] * len(column)
    starts = {part: marks.index(part) for part in tables}
    x = decode(encoded, lambda i: f"{files[marks[i]]} row {i - starts[marks[i]]}", size)
    return dict(zip(tables, x.split([table.num_rows for table in tables.values()]), strict=True))


def _features(table: Any, names: list[str], label: str, where: str) -> Tensor:
    """Numeric columns side by side, float32 ``(N, D)``."""
    import pyarrow as pa

    def numeric(kind: Any) -> bool:
        return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)

    columns = []
    for name in names:
        kind = table.schema.field(name).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if name == label or not (numeric(kind) or is_list and numeric(kind.value_type)):
            continue
        column = _whole(table, name, where)
        flat = column.flatten() if is_list else column
        if flat.null_count:
            raise DataError(
                f"{where}: {flat.null_count} numbers are missing in the column {name!r}; fill or drop them."
            )
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32)
        if is_list and len({len(v) for v in column.to_pylist()}) != 1:
            raise DataError(f"{where}: the lists in the column {name!r} have several lengths; make them one length.")
        columns.append(values.reshape(table.num_rows, -1))
    if not columns:
        raise DataError(f"{where}: neither pictures nor numbers among the columns {', '.join(names)}.")
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _whole(table: Any, name: str, where: str) -> Any:
    """A column as one array without empty cells."""
    import pyarrow as pa

    chunks = table.column(name).combine_chunks()
    column = chunks if isinstance(chunks, pa.Array) else pa.concat_arrays(chunks.chunks)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise DataError(
            f"{where}: {column.null_count} of {len(column)} cells of the column {name!r} are empty; fill or drop them."
        )
    return column


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))
    )
