"""Make the two files that are handed in: `python report/hand_in.py --lastname NAME --report FILE`.

NAME_EE8520_F25.pdf is the report. NAME_EE8520_F25.zip holds the code, with data, figures and trained networks.
"""

import io
import re
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_code
from utils.files import ROOT, UserError, write_atomically
from utils.machine import say
from utils.options import ArgumentParser, folder

REPORT = ROOT / "report" / "report.pdf"
# The archive has the files of these kinds, wherever they lie, but nothing hidden, no experiments, no other
# data sets, no report, no choice of its runs and no earlier hand-in.
KINDS = "LICENSE .py .ipynb .md .txt .ini .gz .pt .npz .json .csv .png .pdf .gif".split()
LEFT_OUT = ".* __pycache__ venv runs seeds ablation checkpoint.pt compare.png ?*MNIST".split()
LEFT_OUT += "report.pdf skeleton.pdf runs.json *_EE8520_F25.pdf".split()
NAME = r'[^-. <>:"/\\|?*][^<>:"/\\|?*]{,39}'  # which can begin a file's name on every system


def archive(top, root=ROOT):
    """Return a zip archive of the project in one folder called `top`, as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as content:
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            left_out = any(fnmatch(part, pattern) for part in parts for pattern in LEFT_OUT)
            if path.is_file() and (path.suffix or path.name) in KINDS and not left_out:
                content.write(path, "/".join([top, *parts]))
    return buffer.getvalue()


def main(argv=None):
    """Write both files, for a list of flags; return the exit code."""
    parser = ArgumentParser(prog="hand_in.py", description=__doc__)
    parser.add_argument("--lastname", required=True, metavar="NAME", help="begins the names of both files")
    parser.add_argument("--report", type=folder, default=REPORT, help="the PDF (report/report.pdf)")
    parser.add_argument("--out-dir", type=folder, default=Path(), help="folder for them (the current one)")

    def work():
        args = parser.parse_args(argv or [])
        if not args.lastname.isprintable() or not re.fullmatch(NAME, args.lastname):
            raise UserError(f"no file's name begins with --lastname {args.lastname!a}: take up to 40 letters")
        name = f"{args.lastname}_EE8520_F25"
        try:
            outputs = {f"{name}.pdf": args.report.read_bytes(), f"{name}.zip": archive(name)}
        except OSError as error:
            hint = "mend it, or build another --report with latexmk"
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): {hint}") from None
        for file, content in outputs.items():
            write_atomically(args.out_dir / file, content)
            say(f"wrote {args.out_dir / file}")
        if args.report == REPORT:
            say("The PDF is the report of the reference solution. Hand in your own with --report FILE.")

    return exit_code(work, "hand_in.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
