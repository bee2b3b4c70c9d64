"""Which pairs belong to one recording: neighbouring frames look alike, so statistics must not count them as strangers.

A manifest says it in its column `sequence`. Ids of MFNet, and of MSRS, which was made from it, are frame numbers and
the time of day: 00123D. There, frames closer than NEAR are of one sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusionsam.data.splits import FLIP, Entry

NEAR = 6
"""Frame numbers closer than this are of one sequence."""
_FRAME = re.compile(rf"(\d{{5}})([DN])(?:{FLIP})?")


def recording_sequences(entries: Sequence[Entry]) -> dict[str, str]:
    """Id -> its recording sequence; pairs of which nothing tells the sequence are left out.

    >>> ids = ["00001D", "00004D", "00009D", "00020D"]
    >>> recording_sequences([Entry(i) for i in ids])
    {'00001D': '00001D', '00004D': '00001D', '00009D': '00001D', '00020D': '00020D'}
    """
    found = {entry.id: entry.sequence for entry in entries if entry.sequence}
    frames = []
    for entry in entries:
        if entry.id not in found and (match := _FRAME.fullmatch(entry.id)):
            frames.append((match[2], int(match[1]), entry.id))
    last = ("", -NEAR)
    name = ""
    for letter, number, id in sorted(frames):
        if letter != last[0] or number - last[1] >= NEAR:
            name = f"{number:05d}{letter}"
        found[id], last = name, (letter, number)
    return {entry.id: found[entry.id] for entry in entries if entry.id in found}
