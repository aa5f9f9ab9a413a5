"""Tolerant reading of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from debiaskd.data.sources.problems import DataError

_DELIMITERS = (",", ";", "\t")


def read_csv(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers; every row has all of its header's columns.

    Columns are separated by commas, or by semicolons or tabs where the header has the wanted columns so. `columns` and
    `optional` ones are found whatever their case and the spaces around them.

    Raises:
        DataError: not text, a column is missing or there twice, or a row is cut short.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as content:
            lines = list(content)
        known = {name.casefold(): name for name in (*columns, *optional)}
        headers = {d: next(csv.reader(lines[:1], delimiter=d), []) for d in _DELIMITERS}
        found = {d: [known.get(name.strip().casefold(), name) for name in header] for d, header in headers.items()}
        delimiter = next((d for d in _DELIMITERS if set(columns) <= set(found[d])), ",")
        names = found[delimiter]
        missing = [name for name in columns if name not in names]
        if missing:
            there = f"; there are {', '.join(names)}" if any(name.strip() for name in names) else ""
            raise DataError(f"{file}: no column {', '.join(missing)} in its first line{there}")
        if twice := [name for name in known.values() if names.count(name) > 1]:
            raise DataError(f"{file}: its first line has the column {twice[0]} twice")
        reader = csv.DictReader(lines[1:], names, delimiter=delimiter)
        rows = []
        for row in reader:
            if any(value is None for value in row.values()):
                raise DataError(f"{file}, line {reader.line_num + 1}: the row is cut short")
            rows.append((reader.line_num + 1, row))
    except DataError:
        raise
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV file ({error})") from None
    return rows
