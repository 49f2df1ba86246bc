"""Bad input of every kind, and what the scripts must do with it: one sentence and a non-zero exit, or a skip that is counted.

    python -m tests.corpus                a line a case and a count: cases, tracebacks, files destroyed

Each case makes a folder, runs one script in it, and looks at the exit code, at what was printed, and at every file that was there
before. tests/integration/test_corpus.py runs all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import pickle
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from tests.conftest import draw_slide, write_panda_folder, write_pyramid
from training import checkpoint

REFUSED, RECORDED, ACCEPTED = "refused", "recorded", "accepted"
HEADER = "image_id,data_provider,isup_grade,gleason_score\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Case:
    """make: fills a folder and returns the script's flags. expect: REFUSED (exit code 1 or 2 and one sentence on stderr),
    RECORDED (any exit code, ``says`` is printed), ACCEPTED (exit code 0). says: must be printed."""

    name: str
    script: str
    make: Callable[[Path], list]
    expect: str = REFUSED
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """code: exit code, None after a traceback. printed: stdout and stderr. problems: what is wrong with how the case ended."""

    code: int | None
    printed: str
    problems: list[str]


def run_case(case: Case, folder: Path) -> Outcome:
    """Make the case in ``folder`` (empty), run its script in this process and judge it."""
    flags = [str(flag) for flag in case.make(folder)]
    before = contents(folder)
    output, errors, trace = io.StringIO(), io.StringIO(), ""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    arguments, sys.argv = sys.argv, [f"{case.script}.py", *flags]
    code = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), contextlib.chdir(folder):
            cli.run(importlib.import_module(case.script).main)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001 any exception at all is a traceback for the user, and counted
        trace = traceback.format_exc()
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(code, output.getvalue() + errors.getvalue() + trace, problems(case, code, output, errors, before, folder))


def problems(case: Case, code, output, errors, before: dict, folder: Path) -> list[str]:
    """What is wrong with how a case ended."""
    found = []
    if code is None:
        return ["traceback"]
    if case.expect == REFUSED:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith(("error: ", f"{case.script}.py: error: "))]
        found += [] if code in (1, 2) else [f"exit code {code}"]
        found += [] if len(lines) == 1 else [f"{len(lines)} sentences on stderr"]
    if case.expect == ACCEPTED and code != 0:
        found.append(f"exit code {code}")
    if case.says and case.says not in output.getvalue() + errors.getvalue():
        found.append(f"{case.says!r} was not printed")
    after = contents(folder)
    found += [f"destroyed {name}" for name, digest in before.items() if after.get(name) != digest]
    return found


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file and link by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# -- train.csv and slides: extract_patches.py


def extraction(change: Callable[[Path], None]) -> Callable[[Path], list]:
    """Flags of an extraction from four small slides with masks, changed by ``change``."""

    def make(folder: Path) -> list:
        write_panda_folder(folder / "panda", side=1024)
        change(folder / "panda")
        return extraction_flags(folder)

    return make


def extraction_flags(folder: Path) -> list:
    return ["--data_dir", folder / "panda", "--output_dir", folder / "patches", "--max_patches", 8, "--workers", 0]


def csv(text: str | bytes) -> Callable[[Path], list]:
    body = text if isinstance(text, bytes) else text.encode()
    return extraction(lambda panda: (panda / "train.csv").write_bytes(body))


def csv_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], list]:
    return extraction(lambda panda: (panda / "train.csv").write_bytes(change((panda / "train.csv").read_bytes())))


def first_slide(panda: Path) -> Path:
    return sorted((panda / "train_images").glob("*.tiff"))[0]


def first_mask(panda: Path) -> Path:
    return sorted((panda / "train_label_masks").glob("*.tiff"))[0]


def slide(change: Callable[[Path], None]) -> Callable[[Path], list]:
    return extraction(lambda panda: change(first_slide(panda)))


def mask(change: Callable[[Path], None]) -> Callable[[Path], list]:
    return extraction(lambda panda: change(first_mask(panda)))


def cut(tenths: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        body = path.read_bytes()
        path.write_bytes(body[: len(body) * tenths // 10])

    return change


def saved(mode: str, kind: str) -> Callable[[Path], None]:
    """One picture of ``mode`` without tiles or levels, in place of the slide."""

    def change(path: Path) -> None:
        Image.new(mode, (600, 600)).save(path, kind)

    return change


def written(array: np.ndarray, **options) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, array, **options)


def declared_huge(path: Path) -> None:
    """A TIFF of a few bytes that declares 2 million pixels a side."""
    tags = [(256, 2_000_000), (257, 2_000_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2_000_000), (279, 8)]
    body = b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags))
    body += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4)
    path.write_bytes(body)


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def renamed(name: str) -> Callable[[Path], list]:
    """One slide of that name, without train.csv."""

    def make(folder: Path) -> list:
        (folder / "panda").mkdir()
        write_pyramid(folder / "panda" / f"{name}.tiff", draw_slide(side=1024))
        return extraction_flags(folder)

    return make


def with_mpp(mpp: float | None) -> Callable[[Path], list]:
    return slide(lambda path: write_pyramid(path, draw_slide(side=1024), mpp))


# -- patches: train.py


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(60, 230, (side, side, 3), dtype=np.uint8))


def training(change: Callable[[Path], None], *flags) -> Callable[[Path], list]:
    """Flags that read thirty patches, changed by ``change``, without training on them."""

    def make(folder: Path) -> list:
        patches = folder / "patches"
        for number in range(30):
            path = patches / ("benign", "gleason3")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
        change(patches)
        flags_here = [flag(folder) if callable(flag) else flag for flag in flags]
        return ["--patches", patches, "--image_size", 64, "--preview_augmentation", folder / "preview.png", *flags_here]

    return make


def patch(change: Callable[[Path], None]) -> Callable[[Path], list]:
    return training(lambda patches: change(patches / "benign" / "0.png"))


def bomb(path: Path) -> None:
    """A PNG of a few bytes that declares 60,000 pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


COLUMNS = "path,slide_id,data_provider,isup_grade,gleason_score,label,x,y,level,mpp,tissue,sharpness,split\n"
ROW = "benign/0.png,0,,,,benign,0,0,0,,0.9,100,train\n"


def manifest(text: str | bytes) -> Callable[[Path], list]:
    body = text if isinstance(text, bytes) else text.encode()
    return training(lambda patches: (patches / "patches.csv").write_bytes(body))


# -- checkpoints: generate.py and train.py --resume


class Hostile:
    """Its pickle makes a file named OWNED when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("OWNED",)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile()))


def pickled_in_zip(path: Path) -> None:
    torch.save({"format": 1, "generator": Hostile()}, path)


def holding(content) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def plain_checkpoint() -> dict:
    return {"format": checkpoint.FORMAT, "model": {"model": "dcgan"}, "generator": {"a": torch.zeros(1000)}}


def broken(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        torch.save(plain_checkpoint(), path)
        path.write_bytes(change(path.read_bytes()))

    return make


def generating(make_file: Callable[[Path], None]) -> Callable[[Path], list]:
    def make(folder: Path) -> list:
        make_file(folder / "G.pt")
        return ["--checkpoint", folder / "G.pt", "--num", 2, "--out", folder / "out"]

    return make


def resuming(make_file: Callable[[Path], None]) -> Callable[[Path], list]:
    def make(folder: Path) -> list:
        make_file(folder / "G.pt")
        return training(lambda _: None)(folder) + ["--resume", folder / "G.pt"]

    return make


def file_at(name: str) -> Callable[[Path], Path]:
    """A file where a folder is meant."""

    def make(folder: Path) -> Path:
        (folder / name).write_text("a file\n")
        return folder / name

    return make


def without_preview(make: Callable[[Path], list]) -> Callable[[Path], list]:
    def changed(folder: Path) -> list:
        flags = make(folder)
        place = flags.index("--preview_augmentation")
        return flags[:place] + flags[place + 2 :] + ["--epochs", 1, "--eval_every", 0, "--device", "cpu"]

    return changed


def flags(*given) -> Callable[[Path], list]:
    return lambda folder: [flag(folder) if callable(flag) else flag for flag in given]


def csv_cases() -> Iterator[Case]:
    row = "aaa0,radboud,0,negative\n"
    yield Case("csv missing", "extract_patches", extraction(lambda panda: (panda / "train.csv").unlink()), RECORDED, "unlabelled")
    yield Case("csv empty", "extract_patches", csv(""))
    yield Case("csv header only", "extract_patches", csv(HEADER), RECORDED, "unlabelled")
    yield Case("csv wrong columns", "extract_patches", csv("a,b\n1,2\n"))
    yield Case("csv duplicate ids", "extract_patches", csv(HEADER + row + row), RECORDED)
    yield Case("csv id leaves the folder", "extract_patches", csv(HEADER + "../../etc/passwd,radboud,0,negative\n"))
    yield Case("csv id absolute", "extract_patches", csv(HEADER + "/etc/passwd,radboud,0,negative\n"))
    yield Case("csv id with newline", "extract_patches", csv(HEADER + '"a\nb",radboud,0,negative\n'))
    yield Case("csv id with quotes", "extract_patches", csv(HEADER + '"a""b",radboud,0,negative\n'), ACCEPTED)
    yield Case("csv open quote", "extract_patches", csv(HEADER + '"aaa0,radboud,0,negative\n'))
    yield Case("csv byte-order mark", "extract_patches", csv_changed(lambda body: b"\xef\xbb\xbf" + body), ACCEPTED)
    yield Case("csv Windows line ends", "extract_patches", csv_changed(lambda body: body.replace(b"\n", b"\r\n")), ACCEPTED)
    yield Case("csv UTF-16", "extract_patches", csv((HEADER + row).encode("utf-16")))
    yield Case("csv NUL bytes", "extract_patches", csv(HEADER.encode() + b"aa\0a0,radboud,0,negative\n"))
    yield Case("csv binary", "extract_patches", csv(bytes(range(256)) * 20))
    yield Case("csv grade 9", "extract_patches", csv(HEADER + "aaa0,radboud,9,negative\n"))
    yield Case("csv grade no number", "extract_patches", csv(HEADER + "aaa0,radboud,high,negative\n"))
    yield Case("csv unknown provider", "extract_patches", csv(HEADER + "aaa0,elsewhere,0,negative\n"), ACCEPTED)
    yield Case("csv short row", "extract_patches", csv(HEADER + "aaa0,radboud\n"))
    yield Case("csv long row", "extract_patches", csv(HEADER + "aaa0,radboud,0,negative,1,2,3\n"))
    yield Case("csv is a folder", "extract_patches", extraction(lambda panda: as_folder(panda / "train.csv")))


def slide_cases() -> Iterator[Case]:
    said = "failed_slides.csv"

    def case(name: str, make, expect: str = RECORDED, says: str = said) -> Case:
        return Case(f"slide {name}", "extract_patches", make, expect, says)

    yield case("empty", slide(lambda path: path.write_bytes(b"")))
    yield case("text", slide(lambda path: path.write_text("no slide")))
    for tenths in range(1, 10):
        yield case(f"truncated at {tenths}/10", slide(cut(tenths)))
    yield case("JPEG named .tiff", slide(saved("RGB", "JPEG")))
    yield case("PNG named .tiff", slide(saved("RGB", "PNG")))
    yield case("of 16 bits", slide(written(np.zeros((600, 600, 3), np.uint16), photometric="rgb", tile=(256, 256))))
    yield case("grey", slide(saved("L", "TIFF")), RECORDED, "")
    yield case("palette", slide(saved("P", "TIFF")), RECORDED, "")
    yield case("CMYK", slide(saved("CMYK", "TIFF")), RECORDED, "")
    yield case("declares 2 million pixels a side", slide(declared_huge))
    yield case("link to itself", slide(looped), RECORDED, "")
    yield case("is a folder", slide(as_folder), RECORDED, "")
    yield case("is a pipe", slide(piped), RECORDED, "")
    yield case("one level", slide(written(draw_slide(side=1024), photometric="rgb", tile=(256, 256))), RECORDED, "")
    yield case("no mpp", with_mpp(None), ACCEPTED, "")
    yield case("absurd mpp", with_mpp(1e9), ACCEPTED, "")
    for name in ("with  spaces", "日本語 ß", "x" * 245, "quote'\"", "semi;colon & $(touch x)", "-flag"):
        yield case(f"named {name[:20]}", renamed(name), ACCEPTED, "")
    yield case("mask empty", mask(lambda path: path.write_bytes(b"")), RECORDED, "")
    yield case("mask text", mask(lambda path: path.write_text("no mask")), RECORDED, "")
    yield case("mask cut in half", mask(cut(5)), RECORDED, "")
    yield case("mask of another size", mask(written(np.zeros((300, 300, 3), np.uint8), photometric="rgb")), RECORDED, "")
    yield case("mask of illegal values", mask(written(np.full((1024, 1024, 3), 77, np.uint8), photometric="rgb")), RECORDED, "")
    yield case(
        "masks missing", extraction(lambda panda: [path.unlink() for path in (panda / "train_label_masks").iterdir()]), ACCEPTED, ""
    )


def patch_cases() -> Iterator[Case]:
    def case(name: str, make, expect: str = REFUSED, says: str = "") -> Case:
        return Case(f"patch {name}", "train", make, expect, says)

    skipped = "left out"
    yield case("empty", patch(lambda path: path.write_bytes(b"")), RECORDED, skipped)
    yield case("text", patch(lambda path: path.write_text("no image")), RECORDED, skipped)
    yield case("truncated", patch(cut(5)), RECORDED, skipped)
    yield case("bomb", patch(bomb), RECORDED, skipped)
    yield case("link to itself", patch(looped), RECORDED, "")
    yield case("folder", patch(as_folder), RECORDED, "")
    yield case("16-bit", patch(lambda path: Image.fromarray(np.zeros((64, 64), np.uint16)).save(path)), RECORDED, "")
    yield case("CMYK", patch(lambda path: Image.new("CMYK", (64, 64)).save(path, "JPEG")), ACCEPTED)
    yield case("palette", patch(lambda path: Image.new("P", (64, 64)).save(path)), ACCEPTED)
    yield case("one pixel", patch(lambda path: picture(side=1).save(path)), RECORDED, "")
    yield case("many damaged", training(lambda patches: [p.write_bytes(b"") for p in patches.glob("benign/*")]))
    yield case("none", training(lambda patches: [p.unlink() for p in patches.rglob("*.png")]))
    yield Case("manifest leaves the folder", "train", manifest(COLUMNS + ROW.replace("benign/0", "../../x")))
    yield Case("manifest empty", "train", manifest(""))
    yield Case("manifest without rows", "train", manifest(COLUMNS))
    yield Case("manifest wrong columns", "train", manifest("a,b\n1,2\n"))
    yield Case("manifest unknown label", "train", manifest(COLUMNS + ROW.replace(",benign", ",evil")))
    yield Case("manifest not a number", "train", manifest(COLUMNS + ROW.replace("0.9", "nan")))
    yield Case("manifest cut in a row", "train", manifest(COLUMNS + ROW[:20]))
    yield Case("manifest names missing files", "train", manifest(COLUMNS + ROW.replace("benign/0", "benign/none")))
    yield Case("manifest binary", "train", manifest(bytes(range(256))))


def checkpoint_cases() -> Iterator[Case]:
    files = {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("no checkpoint"),
        "pickle that runs code": pickled,
        "pickle that runs code, zipped": pickled_in_zip,
        "list": holding([1, 2]),
        "of a newer version": holding({"format": 99}),
        "without its parts": holding(plain_checkpoint()),
        "tensors of no known network": holding({"a": torch.zeros(3)}),
        "cut in half": broken(lambda body: body[: len(body) // 2]),
        "cut at its end": broken(lambda body: body[:-10]),
        "one bit flipped": broken(
            lambda body: body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        ),
        "folder": lambda path: path.mkdir(),
        "missing": lambda path: None,
    }
    for name, make_file in files.items():
        yield Case(f"checkpoint {name}, generate", "generate", generating(make_file))
        yield Case(f"checkpoint {name}, resume", "train", resuming(make_file))


def flag_cases() -> Iterator[Case]:
    for given in (
        "--epochs 0", "--epochs -3", "--epochs many", "--batch_size 0", "--image_size 7", "--image_size 100", "--lr_g nan",
        "--lr_d -1", "--r1 -1", "--condition colour", "--model vae", "--objective lsgan", "--workers -1", "--device tpu",
        "--resume nowhere.pt", "--epocs 3", "--keep -1", "--run_name ../x",
    ):  # fmt: skip
        yield Case(f"train {given}", "train", training(lambda _: None, *given.split()))
    for given in ("--level -1", "--min_tissue 2", "--patch_size 0", "--max_patches 0", "--mpp -1", "--format gif", "--workers -1"):
        yield Case(f"extract {given}", "extract_patches", extraction_with(*given.split()))
    yield Case("generate --num 0", "generate", flags("--checkpoint", "G.pt", "--num", 0))
    yield Case("generate without checkpoint", "generate", flags("--num", 2))
    yield Case("evaluate without anything", "evaluate", flags())
    yield Case("evaluate of missing images", "evaluate", flags("--images", "none", "--patches", "none"))
    yield Case("download --grades 9", "download_panda_data", flags("--grades", 9))
    yield Case("download --num_slides 0", "download_panda_data", flags("--num_slides", 0))
    yield Case("check of missing patches", "check_data", flags("--patches", "none"))
    yield Case("train: patches is a file", "train", flags("--patches", file_at("x")))
    yield Case("train: no patches", "train", flags("--patches", "none"))
    plain = without_preview(training(lambda _: None))
    for flag in ("--checkpoint_dir", "--log_dir"):
        yield Case(f"train: {flag} is a file", "train", lambda folder, flag=flag: [*plain(folder), flag, file_at("x")(folder)])
        yield Case(f"train: {flag} cannot be made", "train", lambda folder, flag=flag: [*plain(folder), flag, "/proc/none"])
    for name, value in (("is a file", file_at("x")), ("cannot be made", lambda _: "/proc/none")):
        yield Case(f"extract: --output_dir {name}", "extract_patches", extraction_with("--output_dir", value))
        yield Case(
            f"train: preview {name}",
            "train",
            training(lambda _: None, "--preview_augmentation", lambda folder, value=value: f"{value(folder)}/x.png"),
        )
    yield Case("extract: slides folder is a file", "extract_patches", flags("--data_dir", file_at("x")))
    yield Case("demo slides: --out is a file", "make_demo_slides", flags("--out", file_at("x")))


def extraction_with(*given) -> Callable[[Path], list]:
    def make(folder: Path) -> list:
        return extraction(lambda _: None)(folder) + [flag(folder) if callable(flag) else flag for flag in given]

    return make


def cases() -> list[Case]:
    """All of them."""
    return [*csv_cases(), *slide_cases(), *patch_cases(), *checkpoint_cases(), *flag_cases()]


def main() -> int:
    found, tracebacks, destroyed = cases(), 0, 0
    verbose = "-v" in sys.argv
    wrong = []
    for case in found:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_case(case, Path(folder))
        tracebacks += outcome.code is None
        destroyed += any(problem.startswith("destroyed") for problem in outcome.problems)
        wrong += [case.name] if outcome.problems else []
        print(
            f"{case.expect:9} exit {outcome.code!s:4} {case.name}{': ' + '; '.join(outcome.problems) if outcome.problems else ''}"
        )
        if verbose and outcome.problems:
            print("    " + "\n    ".join(outcome.printed.splitlines()[-8:]))
    print(f"{len(found)} cases, {tracebacks} tracebacks, {destroyed} with files destroyed, {len(wrong)} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
