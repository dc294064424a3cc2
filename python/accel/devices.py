"""What a device lacks: the libraries without which its own kernels do the work, slower."""

import warnings

from . import _core

_told = set()


def missed(device):
    """What is missed on a device, a list of sentences; each is a RuntimeWarning once.

    Raises
    ------
    DeviceError
        When there is no such device, saying what is missing.
    """
    if not device.startswith("cuda"):
        return []
    lines = _core.device(device)["missed"]
    for line in lines:
        if line not in _told:
            _told.add(line)
            warnings.warn(f"accel: {device}: {line}", RuntimeWarning, stacklevel=3)
    return lines
