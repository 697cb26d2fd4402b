"""cffi builder: libbpf, and what vnet/ext/bpf/vnet_bpf.h says, as a Python module.

The compiler reads the real headers, so neither a constant nor a layout can
drift: a name that is gone from a header stops the build. What the compiler
reads is part of the source that is made here, as a hash, so that whatever
changes in it is built anew; and VNET_HEADER says which vnet_bpf.h it was, as
bpf_objects/header does of the programs.
"""

import hashlib
from pathlib import Path

from cffi import FFI

HEADER_DIR = Path(__file__).resolve().parents[2] / "ext" / "bpf"


def _hash(*names: str) -> str:
    """As sha256sum says of the files one after another, the first 16 digits."""
    content = b"".join((HEADER_DIR / name).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()[:16]


_CONSTANTS = """
#define VNET_XID_MASK ...
#define VNET_XID_MAX ...
#define VNET_LEVEL_MAX ...
#define VNET_GENERATIONS ...
#define VNET_OWNER_BITS ...
#define VNET_OWNER_FACTOR ...
#define VNET_CONTROL_GENERATION ...
#define VNET_CONTROL_OBSERVE ...
#define VNET_EVENT_BURST ...
#define VNET_EVENT_PER_SECOND ...
#define VNET_COMM ...
enum vnet_raw { VNET_RAW_DENY, VNET_RAW_OWN, VNET_RAW_FULL, ... };
enum vnet_settled { VNET_SETTLED_OUT, VNET_SETTLED_IN, VNET_SETTLED_MAX, ... };
enum vnet_port_scope { VNET_PORT_ANY, VNET_PORT_ADDR, VNET_PORT_WILD, ... };
enum vnet_kind {
    VNET_KIND_NONE, VNET_KIND_RAW, VNET_KIND_PACKET, VNET_KIND_BIND, VNET_KIND_ADDRESS,
    VNET_KIND_PORT, VNET_KIND_FOREIGN, VNET_KIND_MARK, VNET_KIND_SPOOF,
    VNET_KIND_CONNECTION, VNET_KIND_SNOOP, VNET_KIND_MPTCP, VNET_KIND_MAX, ...
};
"""

_STRUCTS = """
struct vnet_facts { uint64_t levels; uint64_t netns_cookie; uint32_t ports, addresses; };
struct vnet_port { uint8_t proto, scope; uint16_t port; uint8_t addr[16]; };
struct vnet_counter_key { uint32_t xid, kind; };
struct vnet_counter {
    uint64_t refused, observed, suppressed, refilled, tokens, untold;
};
struct vnet_event {
    uint64_t when, suppressed;
    uint32_t xid, owner, pid, mark;
    uint8_t kind, observed, family, type;
    uint16_t proto, sport, dport;
    uint8_t saddr[16], daddr[16], pad[6];
    char comm[...];
};
"""

_LIBBPF = """
enum bpf_prog_type {
    BPF_PROG_TYPE_LSM, BPF_PROG_TYPE_CGROUP_SKB, BPF_PROG_TYPE_CGROUP_SOCK,
    BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_CGROUP_SOCKOPT, ...
};
enum bpf_attach_type { BPF_CGROUP_INET_INGRESS, ... };

struct bpf_object;
struct bpf_program;
struct bpf_map;
struct bpf_object *bpf_object__open_file(const char *path, void *opts);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);
struct bpf_program *bpf_object__next_program(struct bpf_object *, struct bpf_program *);
const char *bpf_program__name(struct bpf_program *);
enum bpf_prog_type bpf_program__type(struct bpf_program *);
enum bpf_attach_type bpf_program__expected_attach_type(struct bpf_program *);
int bpf_program__fd(struct bpf_program *);
struct bpf_map *bpf_object__next_map(struct bpf_object *, struct bpf_map *);
const char *bpf_map__name(struct bpf_map *);
bool bpf_map__is_internal(struct bpf_map *);
int bpf_map__fd(struct bpf_map *);
int bpf_map__reuse_fd(struct bpf_map *, int fd);
int libbpf_num_possible_cpus(void);

int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next);
int bpf_map_lookup_batch(int fd, void *in, void *out, void *keys, void *values,
                         uint32_t *count, void *opts);
int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count,
                         void *opts);
int bpf_link_create(int program, int target, enum bpf_attach_type how, void *opts);
int bpf_link_detach(int fd);
int bpf_raw_tracepoint_open(const char *name, int program);

void vnet_listen(void);
const char *vnet_heard(void);
void vnet_forget(void);
int vnet_prog_id(int fd);
int vnet_map_info(int fd, uint32_t *numbers);
int vnet_link_info(int fd, uint64_t *numbers);
int vnet_table_create(const char *name, uint32_t key, uint32_t value, uint32_t entries);
int vnet_slashes(int fd);
int vnet_cgroup_level(int root, int top, uint64_t id);
int vnet_getfd(int pidfd, int fd);

int vnet_ring_read(const uint8_t *producer, size_t page, size_t size, unsigned long *at,
                   struct vnet_event *out, int room, unsigned long *unknown);
unsigned long vnet_ring_position(const void *consumer);
void vnet_ring_release(void *consumer, unsigned long at);
"""

ffibuilder = FFI()
ffibuilder.cdef(_CONSTANTS + _STRUCTS + _LIBBPF + "static char *const VNET_HEADER;")
ffibuilder.set_source(
    "vnet._bpf",
    f"""/* {_hash("glue.h", "ring.h")} */
#include "glue.h"
#include "ring.h"
#include "vnet_bpf.h"
static char *const VNET_HEADER = "{_hash("vnet_bpf.h")}";
""",
    include_dirs=[str(HEADER_DIR)],
    libraries=["bpf"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
