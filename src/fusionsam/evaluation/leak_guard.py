"""Whether the evaluated pairs were trained on: by the lists and pictures of the training splits that are here, and by
the fingerprints that weights carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusionsam.data.fingerprints import Digests, Fingerprints, fingerprint
from fusionsam.data.leaks import Leak, compare, weigh
from fusionsam.data.splits import Entry, entries
from fusionsam.evaluation.report_parts import LeakFindings
from fusionsam.types import InputError, NoSplit
from fusionsam.weights import checkpoint
from fusionsam.weights.checkpoint import Card

FITTED = {
    "calibration": "the temperature was fitted on: confidences (ECE) are too good here, and so may be the "
    "class maps of several views (--flip, --scales), whose mean depends on it",
    "class_offsets": "the class offsets were fitted on: IoUs are too good here; what they gain on other pairs is in "
    "training.json",
}
"""What is fitted, by the names of checkpoint.CALIBRATED."""


@dataclass(frozen=True)
class TrainingList:
    """A list of training pairs: data set, its root, the split's name, and the class file where it needs one."""

    dataset: str
    root: str
    split: str
    class_file: str | Path | None = None
    weights: tuple[Path, ...] = ()
    """Folders of the checkpoints that were trained on it, as far as they are known."""

    @property
    def name(self) -> str:
        """As the report names it."""
        return f"{self.dataset}/{self.split}"


@dataclass
class Seen:
    """Fingerprints of pairs that were trained on, under the name that messages give them, with an id for each."""

    name: str
    prints: Fingerprints
    ids: list[str]


@dataclass
class LeakCheck:
    """What the guard found; `findings` is what a report keeps under `leak_guard`."""

    checked: list[str] = field(default_factory=list)
    """What was compared with."""
    off: bool = False
    """No training list was compared, because nobody wanted it."""
    found: list[Leak] = field(default_factory=list)
    """Pictures that were trained on, each once."""
    alike: list[Leak] = field(default_factory=list)
    """Look-alikes, which are not refused."""
    notes: list[str] = field(default_factory=list)
    content: list[Digests] = field(default_factory=list)
    """Digests of the evaluated pairs' pixels."""

    @property
    def leaks(self) -> int:
        """Evaluated pictures that were trained on."""
        return len({leak.second_id for leak in self.found})

    @property
    def findings(self) -> LeakFindings:
        """The counts, for a report."""
        kinds: dict[str, int] = dict(sorted(Counter(leak.kind for leak in self.found).items()))
        return LeakFindings(list(self.checked), self.off, self.leaks, kinds, len(self.alike))

    def add(self, seen: Seen, evaluated: Sequence[Entry], split: str, prints: Fingerprints) -> None:
        """Compare with one training set. One picture of several trainings counts once."""
        training = f"{seen.name} (training)"
        ids = {training: seen.ids, split: [entry.id for entry in evaluated]}
        leaks = compare({training: seen.prints, split: prints}, ids)
        refused, stray = weigh(leaks, {training: seen.ids, split: evaluated})
        for kept, new in ((self.found, refused), (self.alike, stray)):
            before = {leak.second_id for leak in kept}
            kept += [leak for leak in new if leak.second_id not in before]
        self.checked.append(seen.name)


def training_lists(
    cards: Sequence[Card],
    dataset: str,
    root: str | Path,
    train_split: str | None = None,
    class_file: str | Path | None = None,
    folders: Sequence[Path] = (),
) -> list[TrainingList]:
    """The lists that the weights of `cards`, which lie in `folders`, were trained on, as they record it, each once;
    without a card, or where a card says nothing, `train` of the evaluated data set. `train_split` takes the place of
    the recorded name."""
    found: dict[tuple[str, str, str], TrainingList] = {}
    for place, card in enumerate(cards or [{}]):
        data = (card.get("config") or {}).get("data") or card.get("data") or {}
        name = train_split or data.get("train_split") or "train"
        if data.get("dataset") in (None, dataset):
            one = TrainingList(dataset, str(root), name, class_file)
        else:  # MSRS repeats MFNet's pictures: another data set is no excuse
            one = TrainingList(data["dataset"], str(data.get("root")), name, data.get("class_file"))
        key = (one.dataset, one.root, one.split)
        before = found[key].weights if key in found else ()
        found[key] = replace(one, weights=(*before, *folders[place : place + 1]))
    return list(found.values())


def check_leaks(
    evaluated: Sequence[Entry],
    split: str,
    lists: Sequence[TrainingList] = (),
    folders: Sequence[Path] = (),
    *,
    off: bool = False,
    wanted: str | None = None,
    known_weights: bool = False,
    allowed: bool = False,
) -> LeakCheck:
    """Compare the evaluated pairs with what was trained on.

    Args:
        evaluated: The pairs that are scored.
        split: Their name in messages.
        lists: Training lists to compare with; of one that is not here the notes name the checkpoints that nothing else
            tells of.
        folders: Checkpoint folders whose fingerprints tell what they saw.
        off: Nobody wants the lists compared, which the notes say.
        wanted: The name of the split that was asked for; then its list must be there.
        known_weights: It is known which weights predicted, so that the pairs' digests are wanted in any case.
        allowed: Pictures that were trained on are told, not refused.

    Returns:
        What was found.

    Raises:
        InputError: pictures were trained on and that is not `allowed`, or a list that was asked for is not there.
    """
    found = LeakCheck(off=off)
    if off:
        found.notes.append("no list of training pictures was compared (--train-split none)")
    remembered = _remembered(folders)
    read = _read_lists([] if off else lists, wanted, remembered, found.notes)
    known = [*read, *remembered.values()]
    # of predictions that nobody knows the training of, with no list to compare, nothing is to be looked up
    prints = fingerprint(split, evaluated) if known or known_weights else Fingerprints()
    found.content = prints.content
    for seen in known:
        found.add(seen, evaluated, split, prints)
    if found.found:
        shown = "; ".join(map(str, found.found[:3]))
        shown += f"; and {len(found.found) - 3} more" if len(found.found) > 3 else ""
        if not allowed:
            raise InputError(
                f"split {split!r}: {found.leaks} of its {len(evaluated)} pictures are in the training split: {shown}; "
                "evaluate on pictures the weights never saw"
            )
        found.notes.append(f"leaks: {shown}")
    if found.alike:
        what = f"{len(found.alike)} look-alikes in the training split (not refused), for example {found.alike[0]}"
        found.notes.append(what)
    return found


def _remembered(folders: Sequence[Path]) -> dict[Path, Seen]:
    """What the checkpoint folders carry of their training pictures."""
    found = {}
    for folder in folders:
        if (prints := Fingerprints.read(folder)) is not None:
            ids = [f"pair {number}" for number in range(1, len(prints.content) + 1)]
            found[folder] = Seen(f"{folder.name} (fingerprints)", prints, ids)
    return found


def _read_lists(
    lists: Sequence[TrainingList], wanted: str | None, remembered: Collection[Path], notes: list[str]
) -> list[Seen]:
    """The lists that are here, the last one first; of others a line in `notes`, unless the fingerprints of all that was
    trained on them are there (`remembered`)."""
    found: list[Seen] = []
    for one in lists:
        try:
            training = entries(one.dataset, one.root, one.split, one.class_file)
        except InputError as error:
            if wanted is not None:
                raise InputError(f"--train-split {one.split!r}: {error}") from None
            unknown = [str(folder) for folder in one.weights if folder not in remembered]
            if unknown or not one.weights:
                whose = f", nor are fingerprints in {', '.join(unknown)}" if unknown else ""
                why = "is here" if isinstance(error, NoSplit) else f"could be read ({error})"
                notes.append(f"no list of the training split {one.name} {why}{whose}, so it was not compared")
            continue
        found.insert(0, Seen(one.name, fingerprint(one.name, training), [entry.id for entry in training]))
    return found


def fitted_on(card: Card, content: Sequence[Digests]) -> dict[str, int]:
    """To how many of the evaluated pairs, known by their pixels, `fusionsam calibrate` fitted each of
    checkpoint.CALIBRATED."""
    found = {}
    for key in checkpoint.CALIBRATED:
        known = {tuple(pair) for pair in (card.get(key) or {}).get("content", ())}
        found[key] = sum(pair in known and any(pair) for pair in content)
    return found


def fitted_notes(fitted: Mapping[str, int], pairs: int) -> list[str]:
    """What a reader of the figures must know of `fitted_on`."""
    return [f"{count} of these {pairs} pairs are of those that {FITTED[key]}" for key, count in fitted.items() if count]
