"""Every kind of file gives the same rows, and a broken one an error that says where."""

from __future__ import annotations

import json

import pytest
from reft_train.data.reading import iter_rows, read_rows
from reft_train.errors import UserError

ROWS = [{"a": "x", "b": "é"}, {"a": 'say "so"', "b": "2, 3"}]
TABLE = 'a,b\nx,é\n"say ""so""","2, 3"\n'


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def written(folder, suffix):
    content = {
        ".json": json.dumps(ROWS),
        ".jsonl": "\n\n".join(map(json.dumps, ROWS)),
        ".csv": TABLE,
        ".tsv": 'a\tb\nx\té\nsay "so"\t2, 3\n',
    }
    if suffix in content:
        return write(folder / f"rows{suffix}", content[suffix])
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_all_kinds_of_files_give_the_same_rows(suffix, tmp_path):
    path = written(tmp_path, suffix)
    assert [row.fields for row in read_rows(path)] == ROWS
    assert list(iter_rows(path)) == read_rows(path)


@pytest.mark.parametrize(
    ("suffix", "where"),
    [
        (".json", "row 2"),
        (".jsonl", "line 3"),
        (".csv", "row 2"),
        (".tsv", "row 2"),
        (".parquet", "row 2"),
    ],
)
def test_a_row_knows_where_it_stands(suffix, where, tmp_path):
    path = written(tmp_path, suffix)
    assert read_rows(path)[1].where == f"{where} of {path}"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(suffix, tmp_path):
    content = written(tmp_path, suffix).read_bytes()
    path = write(tmp_path / f"windows{suffix}", b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert [row.fields for row in read_rows(path)] == ROWS


def test_types_are_kept_where_the_file_has_them(tmp_path):
    rows = [{"label": 1, "score": 2.5, "messages": [{"role": "user", "content": "x"}]}]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (tmp_path / "rows.parquet", write(tmp_path / "rows.jsonl", json.dumps(rows[0]))):
        (row,) = read_rows(path)
        assert row.fields == rows[0] and type(row.fields["label"]) is int


def test_a_newline_in_a_quoted_field_is_text(tmp_path):
    (row,) = read_rows(write(tmp_path / "rows.csv", 'a,b\n"one\ntwo",2\n'))
    assert row.fields == {"a": "one\ntwo", "b": "2"}


def test_a_row_is_read_before_the_next_one(tmp_path):
    rows = iter_rows(write(tmp_path / "rows.jsonl", '{"a": 1}\n{broken'))
    assert next(rows).fields == {"a": 1}
    with pytest.raises(UserError, match="line 2, column 2"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"line 2, column 7: Expecting value"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', r"got line 3 of .*, which is a list, expected an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, .*can't decode byte 0xff"),
        ("a.json", '[{"a": 1}, 2]', r"got row 2 of .*a\.json, which is a int, expected an object"),
        ("a.json", '{"a": 1}', r"a dict instead of a list of objects"),
        ("a.json", '[{"a": 1}\n', r"line 2 column 1.*, expected a .json file of rows$"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"Extra data: line 2"),
        ("a.json", b'[{"a":\n"\xe9"}]', r"can't decode byte 0xe9"),
        ("a.csv", "a,b\n1\n", r"line 2 does not have 2 fields"),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", r"after row 1 of .*line 4 does not have 2 fields"),
        ("a.csv", "a,a\n1,2\n", r"columns a, a are not distinct"),
        ("a.csv", 'a,b\n1,"2\n', r"unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", r"can't decode byte 0xff"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"line 2 does not have 2 fields"),
        ("a.parquet", "no parquet", r"which cannot be read \(.*[Pp]arquet"),
        ("a.json", "", r"without a row, expected at least one"),
        ("a.json", "[]", r"without a row"),
        ("a.jsonl", "\n\n", r"without a row"),
        ("a.csv", "", r"without a row"),
        ("a.csv", "a,b\n", r"without a row"),
    ],
)
def test_a_broken_file_is_told_by_line_or_row(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=f"^--test: .*{message}"):
        read_rows(path, "--test")


@pytest.mark.parametrize("place", ["trian.json", "none/train.json"])
def test_a_missing_file_is_told(place, tmp_path):
    with pytest.raises(UserError, match=r"which does not exist, expected a file$"):
        read_rows(tmp_path / place)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"which is a folder, expected a file$"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.txt", "rows"])
def test_an_unknown_suffix_is_not_opened(name, tmp_path):
    with pytest.raises(
        UserError, match=r"expected a file that ends in \.json, \.jsonl, \.csv, \.tsv, \.parquet$"
    ):
        read_rows(write(tmp_path / name, "x"))
