"""Build ``netflow._ct``: the conntrack decoder and table of netflow/ext, through cffi.

``setup.py`` takes ``ffibuilder`` from here; ``python netflow/_ct_build.py``
builds the module in place. The declarations are those of ext/ct.h itself, so
there is one definition only, and the C compiler checks that cffi read it right.
"""

import os
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
EXT = Path("netflow/ext")  # relative: setuptools wants it so, and builds in the root


def declarations(header: str) -> str:
    """A header's text without its preprocessor lines, which cffi does not read."""
    return re.sub(r"^#.*$", "", header, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(declarations((ROOT / EXT / "ct.h").read_text()))
ffibuilder.set_source(
    "netflow._ct",
    '#include "ct.h"',
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / EXT).glob("*.c")),
    depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / EXT).glob("*.h")),
    include_dirs=[str(EXT)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    # the name setuptools gives it, so that neither build hides the other's
    ffibuilder.compile(target="_ct.abi3.so", verbose=True)
