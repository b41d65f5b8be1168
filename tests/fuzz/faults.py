"""File systems that fail under a command, and the same command again when they work."""

from __future__ import annotations

import errno

from tests.fuzz.outcome import Fault, Input
from tests.fuzz.values import Random, one_of
from tests.fuzz.world import World

# The errors that file systems of clusters answer with, by call.
_ERRORS = {
    "open": (errno.EACCES, errno.EIO, errno.ESTALE),
    "create": (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO),
    "read": (errno.EIO, errno.ESTALE),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    "rename": (errno.EIO, errno.ENOSPC, errno.EBUSY, errno.EACCES),
    "fsync": (errno.EIO, errno.EINVAL, errno.ENOSPC, errno.EDQUOT),
    "flock": (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP),
    "rmdir": (errno.ENOTEMPTY, errno.EBUSY, errno.EACCES),
    "unlink": (errno.EBUSY, errno.EACCES, errno.ESTALE),
    "mkdir": (errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
}


def failing_file_system(random: Random, world: World) -> Input:
    """One call fails, or all from one on; without the fault the command must end with 0."""
    folder = world.folder
    call = one_of(random, sorted(_ERRORS))
    fault = Fault(
        call=call,
        nth=int(random.geometric(0.08 if call in ("open", "read", "write") else 0.25)),
        error=one_of(random, _ERRORS[call]),
        lasting=bool(random.random() < 0.5),
    )
    config = f"{folder}/config.yaml"
    train = ("train", config, f"output={folder}/new", "train.tokens=1280")
    harvest = ("harvest", config, f"cache.path={folder}/new")
    writing = [harvest, harvest, train, train, ("train", f"{folder}/stopped"),
               ("export", f"{folder}/out"), ("report", f"{folder}/sweep"),
               ("evaluate", f"{folder}/out", "evaluation.sequences=2")]  # fmt: skip
    reading = [("status", f"{folder}/sweep"), ("inspect", f"{folder}/out/store", "--verify"),
               ("inspect", f"{folder}/out"), ("plan", config)]  # fmt: skip
    words = one_of(random, writing + (reading if call in ("open", "read", "flock") else []))
    return Input(words, fault=fault, then=words)
