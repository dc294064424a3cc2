"""A plugin of pytest that writes what tools/gpu_test.py reads: conftest.py has it, and tests of
other folders take it with `-p _figures`."""

import json
import os


def pytest_runtest_logreport(report):
    """One line a test for tools/gpu_test.py: its outcome and its seconds."""
    path = os.environ.get("ACCEL_TEST_FIGURES")
    if not path or (report.when != "call" and report.outcome == "passed"):
        return
    why = report.longrepr if report.outcome != "passed" else ""
    why = why[2] if isinstance(why, tuple) else str(why).strip().splitlines()[-1:]
    with open(path, "a") as file:
        file.write(json.dumps({"kind": "TEST", "what": report.nodeid, "outcome": report.outcome,
                               "why": why if isinstance(why, str) else "".join(why)[-300:],
                               "seconds": round(report.duration, 2)}) + "\n")
