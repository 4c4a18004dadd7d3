"""`python -m jobsched.client.call FOLDER`: what the replicas of a submitted function run.

Started by the job that `client.function` makes. Calls the pickled function and, on rank 0, leaves what it returned in
the folder, whole or not at all. An exception ends the process with its traceback in the replica's log.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

WRONG_PYTHON = 64
"""Exit code when client and node have different Python versions: permanent, restarting does not help."""


def python_version() -> str:
    """Major and minor version, which pickled functions depend on."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def main(folder: Path) -> int:
    """Call the function of this array member; 0 when it returned."""
    written_with = (folder / "python").read_text()
    if written_with != python_version():
        sys.stderr.write(
            f"the function was pickled by Python {written_with}, but this is Python {python_version()}: "
            "submit it with the version that the nodes have\n"
        )
        return WRONG_PYTHON
    import cloudpickle

    with (folder / "call.pkl").open("rb") as source:
        function, calls = cloudpickle.load(source)
    index = max(0, int(os.environ.get("JOBSCHED_ARRAY_INDEX", "0")))
    args, kwargs = calls[index]
    result = function(*args, **kwargs)
    if int(os.environ.get("RANK", "0")) == 0:
        draft = folder / f"result-{index}.{os.getpid()}"
        with draft.open("wb") as out:
            cloudpickle.dump(result, out, protocol=pickle.HIGHEST_PROTOCOL)
        draft.replace(folder / f"result-{index}.pkl")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
