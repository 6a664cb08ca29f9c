"""The textbook submission of tests/assignment as a module: what a student writes from the assignment's words alone.

Tests put its classes in place of the project's, one at a time. They have none of the project's extras: no `sample` or
`logits`, no cast of the inputs, and a mask that is saved with the weights.
"""

from pathlib import Path

for _part in (Path(__file__).parent / "assignment" / "textbook.txt").read_text().split("\n== ")[1:]:
    exec(_part.partition("\n")[2])  # without the name of the file
