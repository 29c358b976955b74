"""Where records come from: JSONL, CSV and Parquet files, Hugging Face data sets, and the folder of development data.

A *source* is one string::

    reviews.jsonl  reviews.jsonl.gz  reviews.csv  reviews.tsv  reviews.parquet      a file
    saved/                                                 a folder written by ``save_to_disk``, or of Parquet files
    datasets:owner/name?config=main&split=train&revision=main                    the Hugging Face hub
    datasets:owner/name?data_dir=main&revision=refs/convert/parquet      the hub's own Parquet copy, one folder a config
    owner/name                                                                 the same, where no such path exists

Everything that is wrong with a source (missing, damaged, a bad line) is a :class:`DataError` that names the place.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl

from softprompts.errors import ConfigError, DataError, DataNotFoundError, nearest

__all__ = ["PlacedRecord", "data_root", "hub_splits", "iter_records", "read_records"]

_HUB_PREFIX = "datasets:"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(\?.*)?")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_HUB_OPTIONS = frozenset({"config", "data_dir", "revision", "split"})
_SPLIT_NAMES = {"dev": ("validation", "dev", "valid", "val"), "train": ("train",), "test": ("test",)}


class PlacedRecord(NamedTuple):
    """A record and where it stands, for error messages."""

    place: str
    """``"'reviews.jsonl', line 7"``."""
    record: dict[str, Any]


def data_root() -> Path | None:
    """Return the folder of benchmark data, or ``None`` where there is none (then tasks load from the hub).

    The environment variable ``SOFTPROMPTS_DATA`` names it; a checkout of the project also looks beside itself.

    Raises:
        DataNotFoundError: ``SOFTPROMPTS_DATA`` is set, but is no folder.
    """
    named = os.environ.get("SOFTPROMPTS_DATA")
    if named:
        root = Path(named).expanduser()
        if not root.is_dir():
            raise DataNotFoundError(f"SOFTPROMPTS_DATA is '{named}', which is no folder; correct or unset it")
        return root
    checkout = Path(__file__).resolve().parents[3]
    beside = checkout.parent / "shared" / "data"
    return beside if (checkout / "pyproject.toml").is_file() and beside.is_dir() else None


def hub_splits(name: str, config: str | None = None, **splits: str) -> dict[str, str]:
    """Name the splits of a data set on the Hugging Face hub, in the Parquet copy that the hub makes of every data set.

    That copy has no scripts, which ``datasets`` no longer runs, and is there for old data sets and new ones alike.

    Args:
        name: ``owner/name``.
        config: Configuration, a folder of the copy; ``None`` where there is only one.
        splits: Our name of a split (train, dev, test) -> the data set's.
    """
    folder = f"data_dir={config}&" if config else ""
    start = f"{_HUB_PREFIX}{name}?{folder}revision=refs/convert/parquet&split="
    return {ours: f"{start}{theirs}" for ours, theirs in splits.items()}


def read_records(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Read all records of a source; see :func:`iter_records`."""
    return [placed.record for placed in iter_records(source, split)]


def iter_records(source: str | Path, split: str = "train") -> Iterator[PlacedRecord]:
    """Yield the records of a source with their places.

    Args:
        source: A file, a folder or a hub name, as in the docstring of this module.
        split: ``train``, ``dev`` or ``test``; which split to take where the source holds several.

    Raises:
        DataNotFoundError: There is no such file, folder, data set or split.
        DataError: A line is no record, or the file is damaged.
        ConfigError: An option behind ``?`` is unknown.
    """
    text = str(source)
    if text.startswith(_HUB_PREFIX):
        return _read_datasets(text.removeprefix(_HUB_PREFIX), split)
    path = Path(text).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _read_file(path)
    if not text.endswith(_SUFFIXES) and not text.startswith((".", "/", "~")) and _HUB_NAME.fullmatch(text):
        return _read_datasets(text, split)
    raise DataNotFoundError(
        f"data file '{text}' does not exist (looked in '{path.absolute().parent}'); give the path of a file that ends "
        f"in {', '.join(_SUFFIXES)}, a folder, or 'datasets:OWNER/NAME' for the Hugging Face hub"
    )


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Iterator[PlacedRecord]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _guarded(path, _read_jsonl)
    if name.endswith((".csv", ".tsv")):
        return _guarded(path, _read_csv)
    if name.endswith(".parquet"):
        return _read_parquet([path], str(path))
    raise DataError(f"'{path}' is of an unknown kind; expected a name that ends in {', '.join(_SUFFIXES)}")


def _guarded(path: Path, reader: Any) -> Iterator[PlacedRecord]:
    """Run ``reader`` on the open file and turn every way in which a file can be damaged into a DataError."""
    try:
        with _open(path) as lines:
            yield from reader(path, lines)
    except UnicodeDecodeError as error:
        line = _undecodable_line(path)
        raise DataError(f"'{path}', line {line}: not UTF-8 text ({error.reason}); convert the file first") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' is no complete gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8. The decoder itself counts from the start of its buffer only."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path, lines: IO[str]) -> Iterator[PlacedRecord]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"'{path}', line {number}"
        try:
            record = json.loads(line)
            line.encode()
            if "\\u" in line:  # an escape can spell half a character, which no tokenizer accepts
                json.dumps(record, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: no valid JSON ({error.msg} at column {error.colno})") from error
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{place}: holds half a surrogate pair ({half!r}), which is no valid text") from error
        except RecursionError as error:
            raise DataError(f"{place}: nested too deeply to be a record") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: got a JSON {type(record).__name__}, expected an object with named fields")
        yield PlacedRecord(place, record)


def _read_csv(path: Path, lines: IO[str]) -> Iterator[PlacedRecord]:
    rows = csv.reader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"'{path}', line 1: the columns {header} are not all named and different")
        for row in rows:
            if not row:
                continue
            place = f"'{path}', line {rows.line_num}"
            if len(row) != len(header):
                raise DataError(f"{place}: got {len(row)} columns, expected {len(header)} ({', '.join(header)})")
            yield PlacedRecord(place, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"'{path}', line {rows.line_num}: no valid CSV ({error})") from error


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face datasets
# --------------------------------------------------------------------------------------------------------------------


def _datasets() -> Any:
    # Imported on use: it takes more than a second, and most sources are plain files.
    return importlib.import_module("datasets")


def _read_folder(path: Path, split: str) -> Iterator[PlacedRecord]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = _datasets().load_from_disk(str(path))
        except Exception as error:  # the package raises many kinds; each means that the folder is unusable
            raise DataError(f"'{path}' is no data set that load_from_disk can read: {error}") from error
        return _rows(loaded, str(path), split)
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise DataNotFoundError(
            f"folder '{path}' holds no data set: expected one written by save_to_disk, or *.parquet files"
        )
    chosen = [file for file in files if _names_split(str(file.relative_to(path)), split)]
    if not chosen and any(_names_split(str(file.relative_to(path)), other) for other in _SPLIT_NAMES for file in files):
        found = ", ".join(str(file.relative_to(path)) for file in files)
        raise DataNotFoundError(f"folder '{path}' holds no '{split}' split among its Parquet files: {found}")
    return _read_parquet(chosen or files, str(path))


def _names_split(name: str, split: str) -> bool:
    """Whether a file name such as ``data/train-00000-of-00002.parquet`` says that it belongs to ``split``."""
    words = re.split(r"[^a-z]+", name.lower())
    return any(candidate in words for candidate in _SPLIT_NAMES.get(split, (split,)))


def _read_parquet(files: list[Path], name: str) -> Iterator[PlacedRecord]:
    try:
        table = _datasets().Dataset.from_parquet([str(file) for file in files], keep_in_memory=True)
    except Exception as error:
        raise DataError(f"'{name}' cannot be read as Parquet: {error}") from error
    return _rows(table, name, "")


def _read_datasets(spec: str, split: str) -> Iterator[PlacedRecord]:
    name, _, query = spec.partition("?")
    options = dict(parse_qsl(query))
    unknown = options.keys() - _HUB_OPTIONS
    if unknown or not name:
        wrong = sorted(unknown)[0] if unknown else "(no name)"
        raise ConfigError(f"source 'datasets:{spec}': {nearest(wrong, _HUB_OPTIONS)}")
    if Path(name).expanduser().is_dir():
        return _read_folder(Path(name).expanduser(), options.get("split", split))
    try:
        folder = {"data_dir": options["data_dir"]} if "data_dir" in options else {}
        loaded = _datasets().load_dataset(name, options.get("config"), revision=options.get("revision"), **folder)
    except Exception as error:  # offline, unknown name, a script that is no longer run, ...: all mean "not to be had"
        raise DataNotFoundError(
            f"data set '{name}' could not be loaded from the Hugging Face hub: {error}. "
            f"Check the name and the network, or give a local file"
        ) from error
    return _rows(loaded, name, options.get("split", split))


def _rows(loaded: Any, name: str, split: str) -> Iterator[PlacedRecord]:
    if isinstance(loaded, dict):  # a DatasetDict: one data set per split
        match = [candidate for candidate in _SPLIT_NAMES.get(split, (split,)) if candidate in loaded]
        if not match:
            raise DataNotFoundError(f"data set '{name}' has no split '{split}': {nearest(split, loaded)}")
        loaded = loaded[match[0]]
    labels = _label_names(loaded)

    def rows() -> Iterator[PlacedRecord]:
        for number, row in enumerate(loaded):
            named = {key: _named(row[key], names) for key, names in labels.items()}
            yield PlacedRecord(f"'{name}', row {number}", {**row, **named})

    return rows()


def _label_names(loaded: Any) -> dict[str, list[str]]:
    """Columns of numbers that stand for names, with the names (``datasets.ClassLabel``)."""
    features = getattr(loaded, "features", None) or {}
    return {key: list(kind.names) for key, kind in features.items() if isinstance(kind, _datasets().ClassLabel)}


def _named(value: Any, names: list[str]) -> Any:
    """Return the name of a label; -1, which stands for "kept secret", stays."""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
