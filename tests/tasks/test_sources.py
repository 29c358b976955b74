"""Records from files, folders and data sets; every way in which they can be broken."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from softprompts.errors import ConfigError, DataError, DataNotFoundError
from softprompts.tasks import data_root, read_records
from softprompts.tasks.sources import iter_records

ROWS = [{"text": "good film\u2028 really", "label": 1}, {"text": "näß", "label": 0}]


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl")


def test_jsonl_plain_and_compressed_hold_the_same_records(jsonl: Path):
    packed = jsonl.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert read_records(jsonl) == ROWS
    assert read_records(packed) == ROWS


def test_jsonl_blank_lines_and_a_byte_order_mark_are_skipped_but_counted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n{"a": 2}\n'.encode())
    assert [(placed.place, placed.record) for placed in iter_records(path)] == [
        (f"'{path}', line 1", {"a": 1}),
        (f"'{path}', line 3", {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: no valid JSON"),
        (b'{"a": 1}\n[1]\n', "line 2: got a JSON list, expected an object"),
        (b'{"a": 1}\n\n"x"\n', "line 3: got a JSON str"),
        (b'{"a": "\xff"}\n', "not UTF-8 text"),
        (b'{"a": "\\ud800"}\n', "line 1: holds half a surrogate pair"),
        (b"[" * 100_000, "line 1: nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: b"no gzip", lambda data: data[:20] + b"\0" * 9]
)
def test_a_damaged_gzip_file_is_our_error(jsonl: Path, damage):
    path = jsonl.with_suffix(".jsonl.gz")
    path.write_bytes(damage(gzip.compress(jsonl.read_bytes() * 50)))
    with pytest.raises(DataError, match="gzip"):
        read_records(path)


def test_damage_inside_the_compressed_data_is_our_error(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    data = bytearray(gzip.compress(b'{"a": 1}\n', mtime=0))
    data[10] |= 0b110  # an illegal block type: zlib.error, which is no OSError
    path.write_bytes(data)
    with pytest.raises(DataError, match="gzip"):
        read_records(path)


def test_a_byte_order_mark_in_a_compressed_file(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"a": 1}'.encode()))
    assert read_records(path) == [{"a": 1}]


def test_csv_and_tsv(tmp_path: Path):
    (tmp_path / "rows.csv").write_text('text,label\n"two\nlines, one field",1\n\nplain,0\n', encoding="utf-8")
    (tmp_path / "rows.tsv").write_text("text\tlabel\na, b\t1\n", encoding="utf-8")
    assert [placed.place[-6:] for placed in iter_records(tmp_path / "rows.csv")] == ["line 3", "line 5"]
    assert read_records(tmp_path / "rows.csv") == [
        {"text": "two\nlines, one field", "label": "1"},
        {"text": "plain", "label": "0"},
    ]
    assert read_records(tmp_path / "rows.tsv") == [{"text": "a, b", "label": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"line 3: got 3 columns, expected 2 \(a, b\)"),
        ("a,b\n1\n", "line 2: got 1 columns"),
        ("a,a\n1,2\n", "line 1: the columns .* are not all named and different"),
        ('a,b\n"1,2\n', "no valid CSV"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_parquet_file_and_folder_and_saved_data_set(tmp_path: Path):
    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "parts").mkdir()
    table.to_parquet(tmp_path / "one.parquet")
    table.to_parquet(tmp_path / "parts" / "train-00000-of-00001.parquet")
    table.select([1]).to_parquet(tmp_path / "parts" / "validation-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(tmp_path / "splits")
    assert read_records(tmp_path / "one.parquet") == ROWS
    assert read_records(tmp_path / "parts", "train") == ROWS
    assert read_records(tmp_path / "parts", "dev") == ROWS[1:]
    assert read_records(tmp_path / "saved") == ROWS
    assert read_records(tmp_path / "splits", "dev") == ROWS[:1]
    assert read_records(f"datasets:{tmp_path / 'splits'}?split=train", "dev") == ROWS
    for place in ("parts", "splits"):
        with pytest.raises(DataNotFoundError, match="test"):
            read_records(tmp_path / place, "test")


def test_a_damaged_saved_data_set_is_our_error(tmp_path: Path):
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="load_from_disk"):
        read_records(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="Parquet"):
        read_records(tmp_path / "bad.parquet")


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/file.csv", "no hub name!"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source: str):
    with pytest.raises(DataNotFoundError, match="does not exist"):
        read_records(source)


def test_other_kinds_of_files_and_empty_folders_are_refused(tmp_path: Path):
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown kind"):
        read_records(tmp_path / "rows.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match="holds no data set"):
        read_records(tmp_path / "empty")


def test_the_hub_gets_name_config_and_revision(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name, config=None, *, revision=None):
        asked.append((name, config, revision))
        return datasets.DatasetDict({"validation": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records("datasets:owner/name?config=main&revision=refs/convert/parquet", "dev") == ROWS
    assert read_records("owner/name", "dev") == ROWS
    assert asked == [("owner/name", "main", "refs/convert/parquet"), ("owner/name", None, None)]
    with pytest.raises(DataNotFoundError, match=r"has no split 'train'.* validation"):
        read_records("owner/name", "train")
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        read_records("datasets:owner/name?splits=train")


def test_whatever_goes_wrong_at_the_hub_is_our_error(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataNotFoundError, match=r"'owner/name' could not be loaded .* no route to host"):
        read_records("owner/name")


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SOFTPROMPTS_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("SOFTPROMPTS_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataNotFoundError, match="SOFTPROMPTS_DATA"):
        data_root()
