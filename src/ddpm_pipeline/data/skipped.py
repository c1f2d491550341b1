"""Rows of the data that cannot be used: how they are recorded, and how many are too many.

A skipped row is a dict that JSON can hold: `row` (its number in the data set; in a stream, its number in the shard `shard`),
`file` if it has one, and `reason`. Imports `support` alone.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..support.atomic import write_text
from ..support.errors import DataError

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
SHOWN = 5  # skipped rows that a message names

SkippedRow = dict[str, Any]


def skipped_row(row: int, reason: str, file: str | None = None, shard: int | None = None) -> SkippedRow:
    found = {"shard": shard, "row": row, "file": file, "reason": reason}
    return {key: value for key, value in found.items() if value is not None}


def describe(skipped: SkippedRow) -> str:
    """Such as "row 7 (cat.png): the file is empty (0 bytes)"."""
    place = f"row {skipped['row']}" + (f" of shard {skipped['shard']}" if "shard" in skipped else "")
    return f"{place}{' (' + skipped['file'] + ')' if 'file' in skipped else ''}: {skipped['reason']}"


def check_bad_fraction(name: str, skipped: Sequence[SkippedRow], bad: int, total: int, max_bad_fraction: float) -> None:
    """Raises DataError if all of the `total` rows are bad, or too large a fraction; the message names the first `skipped`."""
    if bad < total and bad / total <= max_bad_fraction:  # not bad <= total * fraction: 0.29 * 100 is below 29
        return
    allowed = f"more than --max_bad_fraction {max_bad_fraction:g} allows" if bad < total else "and no row is left"
    fix = "Repair or remove them"
    if bad < total:
        fix += f", or skip them by raising --max_bad_fraction; {SKIPPED_FILE} then lists them"
    found = "".join(f"\n  {describe(one)}" for one in skipped[:SHOWN])
    more = f"\n  and {bad - SHOWN:,} more" if bad > SHOWN and skipped else ""
    raise DataError(f"{bad:,} of {total:,} rows of {name} cannot be used, {allowed}. {fix}.{found}{more}")


class SkippedLog:
    """`skipped.jsonl` of a run: one line per skipped row, however often the run meets it."""

    def __init__(self, folder: Path):
        self.path = folder / SKIPPED_FILE
        self._known: set[tuple[int | None, int]] = set()
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        whole = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, AttributeError):  # a run was killed while writing it
                self._known.add(_key(json.loads(line)))
                whole.append(f"{line}\n")
        if len(whole) < len(lines):
            write_text(self.path, "".join(whole))

    def __len__(self) -> int:
        """Number of rows recorded."""
        return len(self._known)

    def add(self, skipped: Iterable[SkippedRow]) -> None:
        """Record the rows that are new, and log a warning that names the first few of them."""
        new = list({_key(one): one for one in skipped if _key(one) not in self._known}.values())
        if not new:
            return
        self._known.update(map(_key, new))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in new)
        shown = "; ".join(map(describe, new[:SHOWN]))
        logger.warning("Skipped %d rows that cannot be used (see %s): %s", len(new), SKIPPED_FILE, shown)


def _key(skipped: SkippedRow) -> tuple[int | None, int]:
    return skipped.get("shard"), skipped["row"]
