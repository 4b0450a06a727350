"""The rows of a Parquet file, some at a time, whatever its size."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file

__all__ = ["parquet_columns", "parquet_rows"]

_IN_MEMORY = 2**23  # bytes of rows
_READ_AHEAD = 2**20  # bytes of a column; without, pyarrow reads a whole column of a row group


def parquet_columns(file: Path) -> list[str]:
    """The names of its columns.

    Raises:
        UserError: where the file cannot be read.
    """
    import pyarrow.parquet

    try:
        with open_file(file) as stream:
            return list(pyarrow.parquet.ParquetFile(stream).schema_arrow.names)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise _unreadable(file, error) from None


def parquet_rows(file: Path, columns: Collection[str], at_a_time: int) -> Iterator[dict[str, Any]]:
    """Its rows, by the columns of these names that it has.

    Args:
        file: itself.
        columns: their names.
        at_a_time: rows that are in memory at most; fewer where they hold more than 8 MiB by what the file says.

    Raises:
        UserError: where the file cannot be read.
    """
    import pyarrow.parquet

    try:
        with open_file(file) as stream:
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=_READ_AHEAD, pre_buffer=False)
            there = [name for name in table.schema_arrow.names if name in columns]
            facts = table.metadata
            size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))  # unpacked
            rows = max(1, min(at_a_time, _IN_MEMORY * facts.num_rows // max(size, 1)))
            for batch in table.iter_batches(batch_size=rows, columns=there):
                yield from batch.to_pylist()
    except UserError:
        raise
    except Exception as error:  # as above
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{escaped(str(file))}: cannot be read: {one_line(error)}")
