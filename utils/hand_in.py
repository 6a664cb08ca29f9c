"""Make the two files that are handed in: `python -m utils.hand_in --lastname NAME`.

NAME_EE8520_F25.pdf is the report. NAME_EE8520_F25.zip holds the code and what it needs to run. The same files give
the same archive, byte for byte, with git or without.
"""

import io
import sys
import zipfile
from pathlib import Path

from utils import machine
from utils.cli import ArgumentParser, exit_code, folder
from utils.files import ROOT, UserError, make_folder, write_atomically

DESCRIPTION = "make the two files that are handed in, the report and an archive of the code"
COURSE = "EE8520_F25"
REPORT = ROOT / "report" / "report.pdf"

# All that the archive holds, as patterns below the repository.
CONTENTS = (
    "README.md",
    "requirements.txt",
    "pytest.ini",
    "hw2_step?_main.py",
    "models/*.py",
    "utils/*.py",
    "tests/*.py",
    "report/make_numbers.py",
    "data/README.md",
    "data/MNIST/raw/*.gz",
    # The trained networks, which --sample-only draws from and the metrics and tests rest on.
    "results/*/model.pt",
    "results/*/config.json",
    "results/*/metrics.json",
    "results/*/floors.json",
    "results/*/variants/*/model.pt",
    "results/*/variants/*/config.json",
    "results/*/variants/*/metrics.json",
)


def files(root=ROOT):
    """Return the paths of the archive's files below the root, sorted as texts.

    Raises:
        UserError: nothing matches a pattern that names a single file or has to match.
    """
    found = {pattern: [path for path in root.glob(pattern) if path.is_file()] for pattern in CONTENTS}
    for pattern, paths in found.items():
        if not paths and "variants" not in pattern:
            raise UserError(f"there is no {pattern} in {root}: hand in from a complete copy of the project")
    return sorted((path for paths in found.values() for path in paths), key=lambda path: path.as_posix())


def archive(root=ROOT):
    """Return the zip archive as bytes: names sorted, one time and one mode for all files, nothing compressed.

    Compressed bytes would differ from one version of zlib to another.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in files(root):
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, whatever this system is, so that the mode counts
            entry.external_attr = 0o100644 << 16
            content.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def file_name(name):
    """Return the name if it can begin the name of a file on every system.

    Raises:
        UserError: it cannot.
    """
    forbidden = '<>:"/\\|?*'
    if not name.isprintable() or set(name) & set(forbidden):
        raise UserError(
            f"--lastname takes a name without {forbidden} and control characters, not {ascii(name)}"
        )
    if not name or name != name.strip(" .") or name.startswith("-") or len(name.encode()) > 100:
        raise UserError(
            "--lastname takes 1 to 100 bytes that do not begin with '-' nor begin or end with ' ' or '.'"
        )
    return name


def hand_in(argv):
    """Write both files, for a list of flags."""
    parser = ArgumentParser(prog="python -m utils.hand_in", description=DESCRIPTION)
    parser.add_argument("--lastname", required=True, metavar="NAME", help="begins the names of both files")
    parser.add_argument("--out-dir", type=folder, default=Path(), help="folder for them (the current one)")
    args = parser.parse_args(argv)
    stem = args.out_dir / f"{file_name(args.lastname)}_{COURSE}"
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
