"""What the three steps share."""

import importlib.util
import os

# A notebook names its matplotlib backend to the commands that it starts. Where the backend's package is missing,
# importing matplotlib would fail.
_, _, _package = os.environ.get("MPLBACKEND", "").partition("module://")
if _package and importlib.util.find_spec(_package.partition(".")[0]) is None:
    del os.environ["MPLBACKEND"]
