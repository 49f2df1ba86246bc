"""What the numbers of ``data.quality`` mean for a folder of patches: findings, counts, and which patches to set aside."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data import manifest, quality_rows
from data.findings import Assessment, Facts, Finding, Scan, printable
from data.panda import LABELS, PROVIDERS
from data.quality import HASH_SIZE, Listing, list_folder, scan_folder

# Perceptual hashes of copies of real patches (JPEG quality 50 to 90, brighter by 15 %, tinted, blurred, resized) were at most
# 8 bits of 256 apart; any two different patches of 40 slides of real prostate tissue, neighbours included, at least 90.
# 15 is the most that 16 bands of 16 bits find without fail.
NEAR_BITS = 15
_BANDS = 16
# Real patches blurred by a Gaussian of 2 pixels kept 2 to 8 % of the median sharpness; the softest sharp one had 36 %.
BLUR_SHARE = 0.15
BLUR_CEILING = 40.0  # sharp on any scanner: real patches blurred by 2 pixels reached 19, the softest sharp one 85
# Robust deviations from the provider's median optical density; the oddest of 1,236 real patches was at 4.1.
STAIN_DEVIATIONS = 6.0
MIN_FOR_STATISTICS = 20
LARGE_GAP = 0.8  # standard deviations between two means; a large effect by Cohen's convention


@dataclass(frozen=True)
class Fault:
    """A reason why one patch is broken. ``movable``: ``--quarantine`` sets such a patch aside."""

    title: str
    advice: str
    movable: bool = True


_SET_ASIDE = "set them aside with --quarantine, or extract them again"
FAULTS = {
    "name": Fault("names that a csv file cannot hold", "rename these files by hand: they are neither read nor moved", False),
    "not_a_file": Fault("broken links, folders or devices named like a patch", "put a plain file in their place by hand", False),
    "unreadable": Fault("files that may not be read", "give yourself read permission (chmod u+r)", False),
    "damaged": Fault("damaged pictures", _SET_ASIDE),
    "too_large": Fault("pictures far too large for a patch", f"they were not decoded; {_SET_ASIDE}"),
    "no_colour": Fault("pictures without RGB colour", f"training needs colour; {_SET_ASIDE}"),
    "blank": Fault("blank patches", f"they teach the generator empty glass; {_SET_ASIDE}"),
    "odd_size": Fault("patches of another size than most", _SET_ASIDE),
    "duplicate": Fault("exact copies of another patch", "--quarantine keeps the first copy and sets the others aside"),
    "contradictory": Fault("exact copies under different labels", "no label is known to be right: --quarantine sets all aside"),
}


def scan_patch_folder(folder: Path, workers: int) -> tuple[Listing, dict[str, Scan]]:
    """List a patch folder and look at every picture in it, in ``workers`` processes; nothing is judged yet."""
    listing = list_folder(folder)
    readable = [path for path in listing.images if printable(path) == path and "\\" not in path]
    scans = scan_folder(folder, readable, workers)
    return listing, scans | {path: Scan(path, "name") for path in set(listing.images) - set(readable)}


def assess(folder: Path, listing: Listing, scans: dict[str, Scan]) -> Assessment:
    """Judge a patch folder from its listing, the scans of its images and its manifest as it is now."""
    rows, findings = quality_rows.rows(folder)
    by_path = {manifest.plain(row.path): row for row in rows or ()}
    lone_split = manifest.has_lone_splits(scans)
    facts = {path: quality_rows.facts(path, by_path.get(path), lone_split) for path in scans}
    members = scans.keys() if rows is None else scans.keys() & by_path.keys()  # training reads no file without a row
    faults = find_faults(scans, facts, members)
    good = {path: scan for path, scan in scans.items() if path not in faults}
    known = {path: facts[path] for path in good}
    fit = {path: facts[path] for path in good if path in members}
    findings += [*_fault_findings(faults, scans), *_mode_findings(good), *_listing_findings(listing, rows is None)]
    if rows is not None:
        findings += quality_rows.manifest_findings(rows, by_path, scans)
    findings += [*_blur(good, known), *_near_duplicates(good, fit), *_stain_outliers(good, known), *_stain_gap(good, known)]
    findings += [*quality_rows.split_findings(fit), *quality_rows.balance_findings(fit), *quality_rows.amount(folder, fit)]
    return Assessment(
        "patches",
        folder,
        f"{len(members):,} patches of {len({facts[path].slide_id for path in members}):,} slides, {len(fit):,} fit for training",
        findings,
        _tables(fit, good),
        {path: f"{FAULTS[key].title}: {detail}" for path, (key, detail) in faults.items() if FAULTS[key].movable},
        {path: good[path] for path in fit},
        fit,
    )


def find_faults(scans: dict[str, Scan], facts: dict[str, Facts], members: Set[str]) -> dict[str, tuple[str, str]]:
    """path -> (key of FAULTS, detail), one fault a patch. Of identical patches the first of ``members`` is kept.

    members: the patches of the data set, those with a manifest row; without a manifest all.
    """
    faults = {path: (scan.fault, scan.detail) for path, scan in scans.items() if scan.fault}
    usual = _usual_size({path: scan for path, scan in scans.items() if path not in faults}, members)
    copies = defaultdict(list)
    for path, scan in scans.items():
        if path in faults:
            continue
        if scan.size != usual:
            faults[path] = ("odd_size", f"{scan.size[0]} x {scan.size[1]}, most are {usual[0]} x {usual[1]}")
        else:
            copies[scan.digest].append(path)
    for paths in copies.values():
        faults |= _copy_faults(sorted(paths, key=lambda path: (path not in members, path)), facts, members)
    return faults


def _usual_size(sound: dict[str, Scan], members: Set[str]) -> tuple[int, int]:
    """The size of most ``members``, the larger of two that are as frequent; where none of them is sound, that of most files."""
    sizes = Counter(scan.size for path, scan in sound.items() if path in members) or Counter(scan.size for scan in sound.values())
    return max(sizes, key=lambda size: (sizes[size], size), default=(0, 0))


def _copy_faults(paths: list[str], facts: dict[str, Facts], members: Set[str]) -> dict[str, tuple[str, str]]:
    first, *others = paths
    if len({facts[path].label for path in paths if path in members or first not in members}) > 1:
        return {path: ("contradictory", f"same pixels as {others[0] if path == first else first}") for path in paths}
    across = {path for path in others if path in members and facts[path].split != facts[first].split}  # strays are on no side
    leak = " (on the other side of the split)"
    return {path: ("duplicate", f"same pixels as {first}{leak if path in across else ''}") for path in others}


def _fault_findings(faults: dict[str, tuple[str, str]], scans: dict[str, Scan]) -> Iterator[Finding]:
    for key, fault in FAULTS.items():
        hit = sorted(path for path, (found, _) in faults.items() if found == key)
        if hit:
            items = tuple(printable(f"{path}: {faults[path][1]}" if faults[path][1] else path) for path in hit)
            pictures = tuple(path for path in hit if scans[path].digest)
            yield Finding("broken", key, fault.title, fault.advice, items, pictures)


def _mode_findings(good: dict[str, Scan]) -> Iterator[Finding]:
    odd = tuple(f"{path}: mode {scan.mode}" for path, scan in good.items() if scan.mode != "RGB")
    if odd:
        yield Finding("warning", "mode", "patches that are not RGB", "training converts them; better save them as RGB", odd)


def _listing_findings(listing: Listing, without_manifest: bool) -> Iterator[Finding]:
    if listing.unlisted:
        yield Finding(
            "broken", "unlisted", "folders that cannot be read", "give yourself permission (chmod u+rx)", tuple(listing.unlisted)
        )
    if listing.others:
        names = tuple(map(printable, listing.others))
        yield Finding("note", "other_files", "files among the patches that are no pictures", "training ignores them", names)
    if not listing.images:
        way_out = "run extract_patches.py" if without_manifest else "run extract_patches.py again"
        yield Finding("broken", "empty", "no patches", way_out, ("no picture was found",))


def _blur(good: dict[str, Scan], known: dict[str, Facts]) -> Iterator[Finding]:
    """Patches much softer than the usual one of their provider: scanners differ too much for one absolute limit."""
    limits = {
        provider: min(BLUR_SHARE * float(np.median([good[path].sharpness for path in paths])), BLUR_CEILING)
        for provider, paths in _by_provider(known).items()
    }
    soft = [path for path, scan in good.items() if scan.sharpness < limits[known[path].data_provider]]
    soft.sort(key=lambda path: good[path].sharpness)
    if soft:
        items = tuple(f"{path}: sharpness {good[path].sharpness:.1f}" for path in soft)
        advice = "far less sharp than their provider's median; delete what is out of focus, then --quarantine keeps it out"
        yield Finding("warning", "blur", "blurred patches", advice, items, tuple(soft))


def _by_provider(known: dict[str, Facts]) -> dict[str, list[str]]:
    paths = defaultdict(list)
    for path, fact in known.items():
        paths[fact.data_provider].append(path)
    return paths


def near_groups(hashes: np.ndarray, bits: int = NEAR_BITS) -> np.ndarray:
    """Group numbers (N,) of the rows of ``hashes`` ((N, 32) uint8): chains of rows that differ in at most ``bits`` of 256 bits.

    Two hashes that differ in fewer bits than there are bands agree in at least one band, so only rows with an equal band are
    compared: linear in N for hashes that are spread out, and complete for ``bits`` below 16.
    """
    groups = np.arange(len(hashes))
    bands = np.ascontiguousarray(hashes).view(np.uint16)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        keys = bands[order, band]
        left = np.flatnonzero(_undecided(keys, groups[order]))
        for shift in range(1, len(order)):
            left = left[left + shift < len(order)]
            left = left[keys[left] == keys[left + shift]]
            if not len(left):
                break
            one, other = order[left], order[left + shift]
            apart = groups[one] != groups[other]  # what is already in one group need not be compared again
            one, other = one[apart], other[apart]
            near = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1) <= bits
            if near.any():
                groups = _merged(groups, one[near], other[near])
                left = left[_undecided(keys, groups[order])[left]]
    return groups


def _undecided(keys: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which places (N,) of the sorted ``keys`` belong to a run of equal keys that is not all one group yet."""
    starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    if not len(starts):
        return np.zeros(len(keys), bool)
    mixed = np.minimum.reduceat(groups, starts) != np.maximum.reduceat(groups, starts)
    return np.repeat(mixed, np.diff(starts, append=len(keys)))


def _merged(groups: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    links = coo_matrix((np.ones(len(one)), (groups[one], groups[other])), shape=(len(groups), len(groups)))
    return connected_components(links, directed=False)[1][groups]


def _near_duplicates(good: dict[str, Scan], fit: dict[str, Facts]) -> Iterator[Finding]:
    """Groups of ``good`` patches that are nearly identical. Only those in ``fit`` are on a side of the split."""
    hashes = np.frombuffer(b"".join(scan.phash for scan in good.values()), np.uint8).reshape(-1, HASH_SIZE**2 // 8)
    members = defaultdict(list)
    for path, group in zip(good, near_groups(hashes), strict=True):
        members[group].append(path)
    inside, across = [], []
    for group in sorted(group for group in members.values() if len(group) > 1):
        (across if len({fit[path].split for path in group if path in fit}) > 1 else inside).append(group)
    for check, severity, title, found in (
        ("near_duplicates", "warning", "groups of nearly identical patches", inside),
        ("near_leak", "broken", "groups of nearly identical patches on both sides of the split", across),
    ):
        if found:
            advice = "the same tissue saved twice; delete all but one of each group, then --quarantine keeps them out"
            yield Finding(severity, check, title, advice, tuple(map(" = ".join, found)), tuple(chain.from_iterable(found)))


def _stain_outliers(good: dict[str, Scan], known: dict[str, Facts]) -> Iterator[Finding]:
    odd = []
    for paths in _by_provider(known).values():
        if len(paths) < MIN_FOR_STATISTICS:
            continue
        od = np.array([good[path].od for path in paths])
        spread = 1.4826 * np.median(np.abs(od - np.median(od, axis=0)), axis=0)
        far = (np.abs(od - np.median(od, axis=0)) / np.maximum(spread, 1e-6)).max(axis=1, where=spread > 0, initial=0.0)
        odd += [(distance, path) for distance, path in zip(far, paths, strict=True) if distance > STAIN_DEVIATIONS]
    if odd:
        odd.sort(reverse=True)
        items = tuple(f"{path}: {distance:.1f} robust deviations from its provider's colour" for distance, path in odd)
        advice = "pen, folds, blood or another stain; delete what is not tissue, then --quarantine keeps it out"
        yield Finding("warning", "stain_outliers", "patches of unusual colour", advice, items, tuple(path for _, path in odd))


def _stain_gap(good: dict[str, Scan], known: dict[str, Facts]) -> Iterator[Finding]:
    """How far apart the providers' stains lie, in pooled standard deviations (Cohen's d) of the channel that differs most."""
    ods = {name: np.array([good[path].od for path in paths]) for name, paths in _by_provider(known).items() if name in PROVIDERS}
    if len(ods) < 2 or min(map(len, ods.values())) < MIN_FOR_STATISTICS:
        return
    one, other = ods.values()
    pooled = np.sqrt((one.var(axis=0) + other.var(axis=0)) / 2)
    gap = float(np.max(np.abs(one.mean(axis=0) - other.mean(axis=0)) / np.maximum(pooled, 1e-6)))
    if gap > LARGE_GAP:
        advice = "a GAN will learn both looks; train.py can normalise stain, and results are to be read per provider"
        item = f"{' and '.join(ods)} differ by {gap:.1f} standard deviations of optical density"
        yield Finding("note", "stain_gap", "providers that differ in stain", advice, (item,))


def _tables(known: dict[str, Facts], good: dict[str, Scan]) -> dict[str, list[list]]:
    providers = sorted({fact.data_provider for fact in known.values()})
    names = [provider or "provider unknown" for provider in providers]
    splits = sorted({fact.split for fact in known.values()})
    count = Counter()
    for fact in known.values():
        count.update([(fact.label, fact.data_provider), (fact.isup_grade, fact.data_provider), (fact.label, "split", fact.split)])
    labels = [label for label in LABELS if any(fact.label == label for fact in known.values())]
    labels += sorted({fact.label for fact in known.values()} - set(LABELS))
    head = ["label", *names, *(split or "split unknown" for split in splits)]
    by_label = [[label, *(count[label, p] for p in providers), *(count[label, "split", s] for s in splits)] for label in labels]
    grades = sorted({fact.isup_grade for fact in known.values()}, key=lambda grade: -1 if grade is None else grade)
    by_grade = [["unknown" if grade is None else grade, *(count[grade, p] for p in providers)] for grade in grades]
    return {
        "Patches by label": [head, *by_label],
        "Patches by the slide's ISUP grade": [["ISUP grade", *names], *by_grade],
        "Stain: optical density of stained pixels, mean ± deviation": _stain_table(known, good),
    }


def _stain_table(known: dict[str, Facts], good: dict[str, Scan]) -> list[list]:
    rows = [["provider", "red", "green", "blue", "stained pixels", "sharpness (median)"]]
    for provider, paths in sorted(_by_provider(known).items()):
        od = np.array([good[path].od for path in paths])
        cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(od.mean(axis=0), od.std(axis=0), strict=True)]
        stained = np.mean([good[path].stained for path in paths])
        sharpness = np.median([good[path].sharpness for path in paths])
        rows.append([provider or "unknown", *cells, f"{stained:.0%}", f"{sharpness:.0f}"])
    return rows
