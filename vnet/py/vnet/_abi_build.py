"""cffi builder: what vnet/ext/kernel/xt_copyxid.h says, as a Python module.

The compiler reads the real header, so a constant cannot drift: a name that
is gone from the header stops the build.
"""

from pathlib import Path

from cffi import FFI

HEADER_DIR = Path(__file__).resolve().parents[2] / "ext" / "kernel"

_CONSTANTS = """
#define COPYXID_MARK_MASK ...
#define COPYXID_ORIG_SHIFT ...
#define COPYXID_REPL_SHIFT ...
#define COPYXID_XID_MAX ...
#define COPYXID_SLICES_MAX ...
#define COPYXID_LEVEL_MAX ...
#define XT_MARK_COPYXID_REVISION ...
#define COPYXID_GENL_VERSION ...
static char *const COPYXID_GENL_NAME;
"""

_ENUMS = """
enum xt_mark_copyxid_flags { XT_MARK_COPYXID, ... };
enum copyxid_cmd {
    COPYXID_CMD_SLICE_SET, COPYXID_CMD_SLICE_DEL, COPYXID_CMD_SLICE_FLUSH,
    COPYXID_CMD_SLICE_GET, COPYXID_CMD_STATS_GET, ...
};
enum copyxid_attr {
    COPYXID_A_UNSPEC, COPYXID_A_PAD, COPYXID_A_CGROUP_ID, COPYXID_A_XID,
    COPYXID_A_LEVEL, COPYXID_A_NETNS, COPYXID_A_COUNTERS, ...
};
enum copyxid_counter {
    COPYXID_CNT_OUT_SOCKET, COPYXID_CNT_OUT_CONN, COPYXID_CNT_IN_SOCKET,
    COPYXID_CNT_IN_LOOKUP, COPYXID_CNT_IN_CONN, COPYXID_CNT_THROUGH_INTERFACE,
    COPYXID_CNT_THROUGH_CONN, COPYXID_CNT_NODE_SOCKET,
    COPYXID_CNT_NO_SOCKET, COPYXID_CNT_NO_CONNTRACK, COPYXID_CNT_OTHER_NETNS,
    COPYXID_CNT_FORWARDED, COPYXID_CNT_FILLED, COPYXID_CNT_CONFLICT,
    COPYXID_CNT_INTRUSION, COPYXID_CNT_MAX, ...
};
struct xt_mark_copyxid_tginfo { uint32_t mark; uint32_t mask; uint32_t flags; };
"""

ffibuilder = FFI()
ffibuilder.cdef(_CONSTANTS + _ENUMS)
ffibuilder.set_source(
    "vnet._abi",
    '#include "xt_copyxid.h"\n',
    include_dirs=[str(HEADER_DIR)],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
