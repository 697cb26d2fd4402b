"""What only this project's own tests stand on: the rules of a session, and guests.

    house    nothing is left behind, nothing is skipped silently
    again    what fails in CI is run once more, and told
    vm       what both sides of a vm test know; vm_host and vm_guest

Namespaces, slices, traffic and captures are in the package, vnet.testing.
"""

import os
from pathlib import Path

# Programs that tests start as ``python -m`` are found by this, in whatever namespace.
_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_TESTS, os.environ.get("PYTHONPATH")]))
