"""How many threads the CPU backend uses: the caller's number, else ACCEL_THREADS, else PyTorch's
count inside a PyTorch program, else all cores this process may use."""

import os

from . import _core

_chosen = "ACCEL_THREADS" in os.environ


def set_num_threads(n):
    """Sets the number of threads of the CPU backend; 0 goes back to the default.

    Results do not depend on it.  Raises InvalidArgument for what is no number of threads.
    """
    global _chosen
    _core.set_num_threads(n)
    _chosen = n != 0 or "ACCEL_THREADS" in os.environ


def get_num_threads():
    """Threads of the CPU backend, the caller's own included."""
    return _core.get_num_threads()


def follow(n):
    """Takes another library's number unless the user chose one."""
    if not _chosen and n != _core.get_num_threads():
        _core.set_num_threads(n)
