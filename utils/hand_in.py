"""Make the two files that are handed in: `python -m utils.hand_in --lastname NAME`.

NAME_EE8520_F25.pdf is the report. NAME_EE8520_F25.zip holds the code and what it needs to run.
"""

import io
import sys
import zipfile
from pathlib import Path

from utils import machine
from utils.cli import exit_code
from utils.files import ROOT, UserError, make_folder, write_atomically
from utils.flags import ArgumentParser, folder

REPORT = ROOT / "report" / "report.pdf"

# Patterns of the archive's files. --sample-only, the metrics and the tests need the trained networks.
CONTENTS = [
    *("README.md", "requirements.txt", "*/README.md", "LICENSE", "pytest.ini", "hw2_step?_main.py"),
    *("models/*.py", "utils/*.py", "tests/*.py", "report/make_numbers.py", "data/MNIST/raw/*.gz"),
    *(f"results/*/{name}" for name in ("model.pt", "config.json", "metrics.json", "floors.json")),
    *(f"results/*/variants/*/{name}" for name in ("model.pt", "config.json", "metrics.json")),
]


def files(root=ROOT):
    """Return the sorted paths of the archive's files; raise UserError if there are none for a pattern."""
    found = []
    for pattern in CONTENTS:
        paths = [*root.glob(pattern)]
        if not paths and "variants" not in pattern:
            raise UserError(f"there is no {pattern} in {root}: hand in from a complete copy of the project")
        found += paths
    return sorted(found, key=Path.as_posix)


def archive(root=ROOT):
    """Return the zip archive, the same bytes for the same files: uncompressed, one time and mode for all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in files(root):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())  # its time is the start of 1980
            entry.create_system = 3  # Unix, so that the mode counts
            entry.external_attr = 0o100644 << 16
            content.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def file_name(name):
    """Return the name if it can begin a file's name on every system, else raise UserError."""
    bad = not name.isprintable() or set(name) & set('<>:"/\\|?*') or name.startswith("-")
    if bad or name != name.strip(" .") or not 1 <= len(name.encode()) <= 100:
        raise UserError(f"no file's name can begin with --lastname {name!a}: take letters, at most 100 bytes")
    return name


def hand_in(argv):
    """Write both files, for a list of flags."""
    description = "make the two files that are handed in, the report and an archive of the code"
    parser = ArgumentParser(prog="python -m utils.hand_in", description=description)
    parser.add_argument("--lastname", required=True, metavar="NAME", help="begins the names of both files")
    parser.add_argument("--out-dir", type=folder, default=Path(), help="folder for them (the current one)")
    args = parser.parse_args(argv)
    stem = args.out_dir / f"{file_name(args.lastname)}_EE8520_F25"
    if not REPORT.is_file():
        raise UserError(f"there is no {REPORT}: build it with latexmk in {REPORT.parent}")
    outputs = {f"{stem}.pdf": REPORT.read_bytes(), f"{stem}.zip": archive()}
    make_folder(args.out_dir)
    for path, content in outputs.items():
        write_atomically(Path(path), content)
        machine.say(f"{path}, {len(content) / 2**20:.1f} MiB")


def main(argv=None):
    """Run with a list of flags; return the exit code."""
    return exit_code(lambda: hand_in(argv or []), "hand_in.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
