/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What Python cannot say to libbpf or to the kernel through cffi alone
 *
 * Compiled into vnet._bpf. Everything returns 0 or more, or -errno.
 */
#ifndef _VNET_GLUE_H
#define _VNET_GLUE_H

#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The last of what libbpf had to say; the verifier's verdict comes last. */
static char vnet_said[16384];

static int vnet_print(enum libbpf_print_level level, const char *format,
		      va_list args)
{
	size_t room = sizeof(vnet_said) - 1, have = strlen(vnet_said), new;
	char *line, *from;

	if (level == LIBBPF_DEBUG || vasprintf(&line, format, args) < 0)
		return 0;
	new = strlen(line);
	from = new > room ? line + new - room : line;
	new = strlen(from);
	if (have + new > room) {
		memmove(vnet_said, vnet_said + have + new - room, room - new);
		have = room - new;
	}
	memcpy(vnet_said + have, from, new + 1);
	free(line);
	return 0;
}

/* Hear libbpf's messages instead of having them on stderr. */
static void vnet_listen(void)
{
	libbpf_set_print(vnet_print);
}

static const char *vnet_heard(void)
{
	return vnet_said;
}

static void vnet_forget(void)
{
	vnet_said[0] = 0;
}

static int vnet_prog_id(int fd)
{
	struct bpf_prog_info info = { };
	__u32 length = sizeof(info);

	return bpf_obj_get_info_by_fd(fd, &info, &length) ? -errno : (int)info.id;
}

/* key size, value size, max_entries, id, type */
static int vnet_map_info(int fd, uint32_t *numbers)
{
	struct bpf_map_info info = { };
	__u32 length = sizeof(info);

	if (bpf_obj_get_info_by_fd(fd, &info, &length))
		return -errno;
	numbers[0] = info.key_size;
	numbers[1] = info.value_size;
	numbers[2] = info.max_entries;
	numbers[3] = info.id;
	numbers[4] = info.type;
	return 0;
}

/* link type, id of the program, id of the cgroup (0: attached to none now) */
static int vnet_link_info(int fd, uint64_t *numbers)
{
	struct bpf_link_info info = { };
	__u32 length = sizeof(info);

	if (bpf_obj_get_info_by_fd(fd, &info, &length))
		return -errno;
	numbers[0] = info.type;
	numbers[1] = info.prog_id;
	numbers[2] = info.type == BPF_LINK_TYPE_CGROUP ? info.cgroup.cgroup_id : 0;
	return 0;
}

/* An inner table, as policy.h's TABLE() describes it. */
static int vnet_table_create(const char *name, uint32_t key_size,
			     uint32_t value_size, uint32_t max_entries)
{
	LIBBPF_OPTS(bpf_map_create_opts, how, .map_flags = BPF_F_NO_PREALLOC);

	return bpf_map_create(BPF_MAP_TYPE_HASH, name, key_size, value_size,
			      max_entries, &how);
}

/* How many slashes are in the path of an open directory. */
static int vnet_slashes(int fd)
{
	char link[32], path[4096 + 64];
	ssize_t length;
	int found = 0;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	length = readlink(link, path, sizeof(path));
	if (length < 0)
		return -errno;
	while (length-- > 0)
		found += path[length] == '/';
	return found;
}

/*
 * How deep below the hierarchy's root a cgroup is; -ESTALE: there is no such
 * cgroup. top is vnet_slashes(root). A file handle of kernfs is the cgroup's
 * id (include/linux/exportfs.h).
 */
static int vnet_cgroup_level(int root, int top, uint64_t id)
{
	struct {
		struct file_handle head;
		__u64 id;
	} handle = { { .handle_bytes = sizeof(id), .handle_type = 0xfe }, id };
	int fd, here;

	_Static_assert(sizeof(handle.head) == 8, "the id follows the head");
	fd = open_by_handle_at(root, (struct file_handle *)&handle, O_PATH);
	if (fd < 0)
		return -errno;
	here = vnet_slashes(fd);
	close(fd);
	return here < 0 ? here : here - top;
}

/* A descriptor of our own for another process's (pidfd_getfd(2), Linux 5.6). */
static int vnet_getfd(int pidfd, int fd)
{
	int got = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

	return got < 0 ? -errno : got;
}

#endif /* _VNET_GLUE_H */
