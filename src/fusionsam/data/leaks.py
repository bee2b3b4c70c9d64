"""The leak guard: are images of one split, or copies of them, in another? Copies are found by id, by the content of the
decoded pixels (also mirrored, or of one modality alone) and by perceptual hash (re-encoded, rescaled, relit, border cut
off)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fusionsam.data.fingerprints import Digests, Fingerprints, fingerprint
from fusionsam.data.splits import Entry
from fusionsam.io import progress_bar
from fusionsam.types import InputError

Kind = Literal["id", "content", "mirrored", "perceptual", "partial"]
_WEIGHED = ("perceptual", "partial")  # what stray frames of one recording may be too

LOOK_ALIKES = 0.2
"""Largest share of a split that may look like images of another one without being refused."""
NEAR = 5
"""Largest Hamming distance of two 64-bit hashes of one picture. On 156 MFNet pairs, JPEG at quality 40 and gamma 0.7
stay within 4; consecutive frames of one recording begin at 6, frames of neighbouring blocks of a recording at 9."""
_MANY = 10**7  # comparisons of one pair with another: from here on they take seconds


@dataclass(frozen=True)
class Leak:
    """One image of split `first` that is also in split `second`."""

    kind: Kind
    first: str
    first_id: str
    second: str
    second_id: str
    distance: int = 0
    """perceptual: the larger Hamming distance of the two modalities, bits of 64."""

    def __str__(self) -> str:
        more = f" at {self.distance} of 64 bits" if self.kind == "perceptual" else ""
        more = ": one modality is equal, the other is not" if self.kind == "partial" else more
        return f"{self.first}/{self.first_id} = {self.second}/{self.second_id} ({self.kind}{more})"


def leaks(splits: Mapping[str, Sequence[Entry]], progress: bool = True) -> list[Leak]:
    """Every image shared by two of the splits, each pair once under its strongest kind.

    id: the same name (a `_flip` suffix aside) in the same folder; content: equal pixels in every modality that
    both pairs have; mirrored: equal so after mirroring; perceptual: dHash within NEAR bits in both modalities (if only
    one is there, in that); partial: equal pixels, mirrored or not, in one of two modalities."""
    prints = {name: fingerprint(name, entries, progress) for name, entries in splits.items()}
    ids = {name: [entry.id for entry in entries] for name, entries in splits.items()}
    return compare(prints, ids)


def compare(prints: Mapping[str, Fingerprints], ids: Mapping[str, Sequence[str]]) -> list[Leak]:
    """`leaks` for splits that have been read already."""
    found: list[Leak] = []
    for first, second in combinations(prints, 2):
        one, two = prints[first], prints[second]
        kinds: dict[tuple[int, int], tuple[Kind, int]] = {}
        same, turned = _equal(one.content, two.content), _equal(one.content, two.mirrored)
        matches: list[tuple[Kind, list[tuple[int, int]]]] = [
            ("id", _shared(one.places, two.places)),
            ("content", [pair for pair, whole in same.items() if whole]),
            ("mirrored", [pair for pair, whole in turned.items() if whole]),
        ]
        for kind, pairs in matches:
            for pair in pairs:
                kinds.setdefault(pair, (kind, 0))
        for pair, distance in _near(one, two):
            kinds.setdefault(pair, ("perceptual", distance))
        for pair in (*same, *turned):
            kinds.setdefault(pair, ("partial", 0))
        for (i, j), (kind, distance) in sorted(kinds.items()):
            found.append(Leak(kind, first, ids[first][i], second, ids[second][j], distance))
    return found


def _shared(left: Sequence[set], right: Sequence[set]) -> list[tuple[int, int]]:
    holders: dict[object, list[int]] = {}
    for j, keys in enumerate(right):
        for key in keys:
            holders.setdefault(key, []).append(j)
    return sorted({(i, j) for i, keys in enumerate(left) for key in keys for j in holders.get(key, ())})


def _equal(left: Sequence[Digests], right: Sequence[Digests]) -> dict[tuple[int, int], bool]:
    """Pairs (i, j) equal in some modality -> whether they are in every one that is known of both."""
    hits = {pair for m in (0, 1) for pair in _shared(*([{d[m]} - {None} for d in side] for side in (left, right)))}
    known = {(i, j): [(a, b) for a, b in zip(left[i], right[j], strict=True) if a and b] for i, j in hits}
    return {pair: all(a == b for a, b in both) for pair, both in known.items()}


def _near(one: Fingerprints, two: Fingerprints) -> list[tuple[tuple[int, int], int]]:
    if not one.hashes or not two.hashes:
        return []
    a, b = np.stack(one.hashes), np.stack(two.hashes)  # (n, variants, 2)
    known_a, known_b = np.stack(one.known), np.stack(two.known)  # (n, 2)
    columns = [np.ascontiguousarray(b[:, :, m].T) for m in (0, 1)]  # (variants, n)
    found = []
    for i in progress_bar(range(len(a)), desc="leak guard: comparing", disable=len(a) * len(b) < _MANY):
        known = known_a[i] & known_b  # (m, 2)
        # each modality alone leaves few of many for both together
        left = np.flatnonzero(known.any(axis=1))
        for m in (0, 1):
            near = _distances(a[i, :, m], columns[m][:, left]).min(axis=0) <= NEAR
            left = left[near | ~known[left, m]]
        both = [_distances(a[i, :, m], columns[m][:, left]) * known[left, m] for m in (0, 1)]
        distance = np.maximum(*both).min(axis=0)
        found += [((i, int(j)), int(far)) for j, far in zip(left, distance, strict=True) if far <= NEAR]
    return found


def _distances(one: NDArray[np.uint64], many: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Bits by which the variants (v,) of a picture differ from those of others (v, m) -> (3 * v, m).

    The copy may be the one that was cut, or the original: whole (or its mirror) against variants, both ways round.
    Mirrored wholes are those of the others, since fingerprints that come with weights have none."""
    return np.bitwise_count(np.concatenate([one[0] ^ many, one[:, None] ^ many[0], one[:, None] ^ many[1]]))


def weigh(found: Sequence[Leak], splits: Mapping[str, Sized]) -> tuple[list[Leak], list[Leak]]:
    """Leaks to refuse, and look-alikes to mention.

    A perceptual hit alone cannot tell a re-encoded copy from the next frame of a parked camera, nor can one equal
    modality of two from a thermal camera that froze; official splits of video may hold such frames on both sides. So
    stray ones are mentioned, and refused where they concern more than LOOK_ALIKES of either split: then it is a copy
    from the other."""
    hits: dict[tuple[str, str, str], set[str]] = {}  # both splits, and of which of them these ids are
    for leak in found:
        if leak.kind in _WEIGHED:
            for split, id in ((leak.first, leak.first_id), (leak.second, leak.second_id)):
                hits.setdefault((leak.first, leak.second, split), set()).add(id)
    copied = {
        (first, second) for (first, second, split), ids in hits.items() if len(ids) > LOOK_ALIKES * len(splits[split])
    }
    stray = [leak.kind in _WEIGHED and (leak.first, leak.second) not in copied for leak in found]
    refused = [leak for leak, alike in zip(found, stray, strict=True) if not alike]
    return refused, [leak for leak, alike in zip(found, stray, strict=True) if alike]


def require_no_leak(splits: Mapping[str, Sequence[Entry]], progress: bool = True) -> None:
    """InputError with the first few leaks if an image is shared by two of the splits (see `weigh`); a line on stderr
    for stray look-alikes."""
    found, alike = weigh(leaks(splits, progress), splits)
    if alike:
        tqdm.write(f"leak guard: {len(alike)} look-alikes across the splits, for example {alike[0]}", file=sys.stderr)
    if found:
        shown = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        raise InputError(
            f"splits {', '.join(splits)} share {len(found)} images: {shown}; expected none in common; remove them from "
            "one split"
        )
