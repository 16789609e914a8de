"""Read the rows of a Parquet file: the columns of documents alone, a few rows at a time.

Memory holds one page of each column and what it becomes; a row group is never read as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ebwm_dist.prepare.documents import Fields, shortened

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

Row = tuple[int, "dict[str, Any] | ValueError"]
_BATCH = 1 << 22  # bytes of columns that are converted at a time, roughly
_MOST_ROWS = 1024


class DamagedRowsError(ValueError):
    """So many rows that cannot be read, for one reason; None: their number cannot be read either."""

    def __init__(self, reason: str, rows: int | None) -> None:
        super().__init__(reason)
        self.rows = rows


def read_rows(stream: BinaryIO, fields: Fields) -> Iterator[Row]:
    """Yield the number of every row, from 1 on, and its content, with nested columns as dictionaries.

    In place of a row that is damaged, and of all that follow it in its row group, comes one error with the reason and
    their number; in place of all rows, if the file does not have the columns.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        columns = _columns(file.schema_arrow, fields)
    except (pyarrow.ArrowException, OSError) as error:
        yield 1, DamagedRowsError(f"not a Parquet file, or its footer is damaged ({_reason(error)})", None)
        return
    except ValueError as error:
        yield 1, DamagedRowsError(str(error), file.metadata.num_rows)
        return
    last = 0
    for group in range(file.num_row_groups):
        number, last = last, last + file.metadata.row_group(group).num_rows
        try:
            for content in _contents(file, group, columns):
                number += 1
                yield number, content
            problem = None if number == last else f"only {number} are there"
        except (pyarrow.ArrowException, OSError) as error:
            problem = _reason(error)
        if problem is not None:
            what = f"damaged row group {group}: rows {number + 1} to {last} cannot be read ({problem})"
            yield number + 1, DamagedRowsError(what, last - number)


def _contents(file: ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any] | ValueError]:
    about = file.metadata.row_group(group)
    size = _BATCH * about.num_rows // max(about.total_byte_size, 1)
    rows = max(1, min(size, _MOST_ROWS))
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        try:
            yield from batch.to_pylist()
        except ValueError:
            yield from (_content(batch.slice(row, 1)) for row in range(batch.num_rows))


def _content(row: pyarrow.RecordBatch) -> dict[str, Any] | ValueError:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError:
        return ValueError("invalid UTF-8")
    except ValueError as error:
        return ValueError(_reason(error))


def _columns(schema: pyarrow.Schema, fields: Fields) -> list[str]:
    """Return the columns to read; raises ValueError if one is missing, or the text is none."""
    types = {name: _type_at(schema, name) for name in vars(fields).values()}
    chosen = [name for key, name in vars(fields).items() if name != getattr(Fields, key)]
    needed = [fields.text]
    if types[fields.text] is None and fields.text not in chosen:
        turns = [fields.prompt, fields.completion]
        needed = turns if any(types[name] is not None for name in turns) or set(turns) & {*chosen} else needed
    ignored = {fields.prompt, fields.completion, fields.difficulty} if fields.text in needed else set()
    needed += [name for name in chosen if name not in ignored]
    if missing := [name for name in dict.fromkeys(needed) if types[name] is None]:
        keys = [key for key, name in vars(fields).items() if name in missing]
        keys = [*dict.fromkeys([*keys, "prompt", "completion"])] if "text" in keys else keys
        raise ValueError(
            f"no column {shortened(map(repr, missing))}; its columns are {shortened(_names(schema))}: choose with "
            f"{', '.join(f'--{key}-column' for key in keys)}"
        )
    if fields.text in needed and not _is_text(types[fields.text]):
        raise ValueError(f"column {fields.text!r} holds {types[fields.text]}, not text: choose with --text-column")
    return [name for name, kind in types.items() if kind is not None]


def _type_at(within: pyarrow.Schema | pyarrow.StructType, name: str) -> pyarrow.DataType | None:
    """Return the type of a column, or None; nested ones are found as `documents.value_at` finds them."""
    from pyarrow.types import is_struct

    if (index := within.get_field_index(name)) >= 0:
        return within.field(index).type
    for place, character in enumerate(name):
        if character == "." and (index := within.get_field_index(name[:place])) >= 0:
            inner = within.field(index).type
            if is_struct(inner) and (found := _type_at(inner, name[place + 1 :])) is not None:
                return found
    return None


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"
    return any(getattr(types, f"is_{test}")(kind) for test in tests)


def _names(within: pyarrow.Schema | pyarrow.StructType, prefix: str = "") -> Iterator[str]:
    """Yield the names of all columns, nested ones with dots."""
    from pyarrow.types import is_struct

    for field in within:
        if is_struct(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
