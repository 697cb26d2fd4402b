// SPDX-License-Identifier: GPL-2.0-only
/*
 * libxt_MARK.c - iptables' side of "-j MARK", with --copy-xid.
 *
 * libxtables takes the first libxt_MARK.so of its search path and no other, so
 * this file does all that the stock plugin does: revision 2 for iptables and
 * ip6tables, the same with its own words for arptables. Revisions 0 and 1 are
 * left out: kernels have not offered them since 2.6.35.
 *
 * To that it adds XT_MARK_COPYXID_REVISION, offered where the kernel has the
 * module xt_copyxid, for the one option --copy-xid. A rule made with a stock
 * option is stored in revision 2 as ever, so that tools without this plugin
 * can read it and the module can be unloaded beside it.
 *
 * Three habits of libxtables and iptables 1.8 shape this file:
 *
 * - Only the highest revision that the kernel knows is kept of one plugin.
 *   iptables-legacy then lists rules of any other as "[unsupported revision]".
 *   So revision 2 is fetched before ours is offered: see _init().
 * - iptables-nft calls print and save of that highest revision for rules of
 *   every revision. So these look at the rule's own revision before they look
 *   at its data.
 * - iptables-nft compares two rules over .userspacesize bytes, whatever the
 *   rule's own size. So ours stops after mark and mask, the part that both
 *   revisions have; of --copy-xid both are 0, as of no stock rule that does
 *   anything.
 */
#include <getopt.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

/* afinfo: which family we are asked for, and by which number the kernel is. */
#define XTABLES_INTERNAL
#include <xtables.h>
#include <linux/netfilter/xt_MARK.h>

#include "../kernel/xt_copyxid.h"

#define STOCK_REVISION	2
#define ALL_BITS	0xffffffffu
#define __unused	__attribute__((unused))

/* Ours begins as stock's does: every reader of mark and mask serves both. */
_Static_assert(offsetof(struct xt_mark_copyxid_tginfo, mark) ==
	       offsetof(struct xt_mark_tginfo2, mark), "mark");
_Static_assert(offsetof(struct xt_mark_copyxid_tginfo, mask) ==
	       offsetof(struct xt_mark_tginfo2, mask), "mask");

/* The order of the ids is the order in which conflicts are named: stock's. */
enum {
	O_SET_MARK,
	O_AND_MARK,
	O_OR_MARK,
	O_XOR_MARK,
	O_SET_XMARK,
	O_COPY_XID,
	F_ANY = (1 << (O_COPY_XID + 1)) - 1,
};

static const struct xt_option_entry mark_opts[] = {
	{.name = "set-xmark", .id = O_SET_XMARK, .type = XTTYPE_MARKMASK32, .excl = F_ANY},
	{.name = "set-mark", .id = O_SET_MARK, .type = XTTYPE_MARKMASK32, .excl = F_ANY},
	{.name = "and-mark", .id = O_AND_MARK, .type = XTTYPE_UINT32, .excl = F_ANY},
	{.name = "or-mark", .id = O_OR_MARK, .type = XTTYPE_UINT32, .excl = F_ANY},
	{.name = "xor-mark", .id = O_XOR_MARK, .type = XTTYPE_UINT32, .excl = F_ANY},
	{.name = "copy-xid", .id = O_COPY_XID, .type = XTTYPE_NONE, .excl = F_ANY},
	XTOPT_TABLEEND,
};

static void stock_help(void)
{
	puts("MARK target options:\n"
	     "  --set-xmark value[/mask]  Clear bits in mask and XOR value into nfmark\n"
	     "  --set-mark value[/mask]   Clear bits in mask and OR value into nfmark\n"
	     "  --and-mark bits           Binary AND the nfmark with bits\n"
	     "  --or-mark bits            Binary OR the nfmark with bits\n"
	     "  --xor-mark bits           Binary XOR the nfmark with bits");
}

static void mark_help(void)
{
	stock_help();
	puts("  --copy-xid                Copy the owning slice's xid into nfmark and ctmark");
}

/* -- parse ---------------------------------------------------------------- */

/* False where the kernel has our revision but not stock's (no xt_mark). */
static bool stock_in_kernel = true;

static void store_as(struct xt_entry_target *t, uint8_t revision, size_t size)
{
	t->u.user.revision = revision;
	t->u.target_size = XT_ALIGN(sizeof(*t)) + XT_ALIGN(size);
}

/* new mark = (old mark & ~mask) ^ mark: each stock option is a case of it */
static void parse_bits(const struct xt_option_call *cb)
{
	struct xt_mark_tginfo2 *info = cb->data;

	switch (cb->entry->id) {
	case O_SET_XMARK:
		*info = (struct xt_mark_tginfo2){cb->val.mark, cb->val.mask};
		break;
	case O_SET_MARK:
		*info = (struct xt_mark_tginfo2){cb->val.mark, cb->val.mark | cb->val.mask};
		break;
	case O_AND_MARK:
		*info = (struct xt_mark_tginfo2){0, ~cb->val.u32};
		break;
	case O_OR_MARK:
		*info = (struct xt_mark_tginfo2){cb->val.u32, cb->val.u32};
		break;
	case O_XOR_MARK:
		*info = (struct xt_mark_tginfo2){cb->val.u32, 0};
		break;
	}
}

static void stock_parse(struct xt_option_call *cb)
{
	xtables_option_parse(cb);
	if (cb->entry->id == O_COPY_XID)
		/* Not PARAMETER_PROBLEM: a second line would send to --help. */
		xtables_error(OTHER_PROBLEM,
			      "MARK: --copy-xid needs the kernel module xt_copyxid, which is not "
			      "loaded: run 'modprobe xt_copyxid' (build and install it first with "
			      "'make module' or DKMS)");
	parse_bits(cb);
}

/* The entry was made with room for our revision; stock's needs less of it. */
static void copyxid_parse(struct xt_option_call *cb)
{
	struct xt_mark_copyxid_tginfo *info = cb->data;

	xtables_option_parse(cb);
	if (cb->entry->id == O_COPY_XID) {
		*info = (struct xt_mark_copyxid_tginfo){.flags = XT_MARK_COPYXID};
		store_as(*cb->target, XT_MARK_COPYXID_REVISION, sizeof(*info));
		return;
	}
	parse_bits(cb);
	if (stock_in_kernel)
		store_as(*cb->target, STOCK_REVISION, sizeof(struct xt_mark_tginfo2));
}

static void mark_check(struct xt_fcheck_call *cb)
{
	if (cb->xflags == 0)
		xtables_error(PARAMETER_PROBLEM,
			      "MARK: One of the --set-xmark, --{and,or,xor,set}-mark "
			      "or --copy-xid options is required");
}

/* -- print, save, translate ----------------------------------------------- */

static bool is_copy_xid(const struct xt_entry_target *t)
{
	const struct xt_mark_copyxid_tginfo *info = (const void *)t->data;

	return t->u.user.revision == XT_MARK_COPYXID_REVISION &&
	       info->flags & XT_MARK_COPYXID;
}

static void mark_print(const void *ip __unused, const struct xt_entry_target *t,
		       int numeric __unused)
{
	const struct xt_mark_tginfo2 *info = (const void *)t->data;

	if (is_copy_xid(t))
		printf(" MARK copy-xid");
	else if (info->mark == 0)
		printf(" MARK and 0x%x", ~info->mask);
	else if (info->mark == info->mask)
		printf(" MARK or 0x%x", info->mark);
	else if (info->mask == 0)
		printf(" MARK xor 0x%x", info->mark);
	else if (info->mask == ALL_BITS)
		printf(" MARK set 0x%x", info->mark);
	else
		printf(" MARK xset 0x%x/0x%x", info->mark, info->mask);
}

static void mark_save(const void *ip __unused, const struct xt_entry_target *t)
{
	const struct xt_mark_tginfo2 *info = (const void *)t->data;

	if (is_copy_xid(t))
		printf(" --copy-xid");
	else
		printf(" --set-xmark 0x%x/0x%x", info->mark, info->mask);
}

static int mark_xlate(struct xt_xlate *xl, const struct xt_xlate_tg_params *params)
{
	const struct xt_mark_tginfo2 *info = (const void *)params->target->data;

	/* nft has no word that finds a packet's owner: shown as a comment. */
	if (is_copy_xid(params->target))
		return 0;

	xt_xlate_add(xl, "meta mark set ");
	if (info->mask == ALL_BITS)
		xt_xlate_add(xl, "0x%x ", info->mark);
	else if (info->mark == 0)
		xt_xlate_add(xl, "mark and 0x%x ", ~info->mask);
	else if (info->mark == info->mask)
		xt_xlate_add(xl, "mark or 0x%x ", info->mark);
	else if (info->mask == 0)
		xt_xlate_add(xl, "mark xor 0x%x ", info->mark);
	else
		xt_xlate_add(xl, "mark and 0x%x xor 0x%x ", ~info->mask, info->mark);
	return 1;
}

/* -- arptables: revision 2 in its own words, hexadecimal without 0x -------- */

enum { ARP_SET = 1, ARP_AND, ARP_OR };

static const struct option arp_opts[] = {
	{.name = "set-mark", .has_arg = required_argument, .val = ARP_SET},
	{.name = "and-mark", .has_arg = required_argument, .val = ARP_AND},
	{.name = "or-mark", .has_arg = required_argument, .val = ARP_OR},
	{.name = NULL},
};

static int arp_parse(int c, char **argv __unused, int invert __unused,
		     unsigned int *flags, const void *entry __unused,
		     struct xt_entry_target **target)
{
	struct xt_mark_tginfo2 *info = (void *)(*target)->data;
	uint32_t bits;

	if (c < ARP_SET || c > ARP_OR)
		return 0;
	if (sscanf(optarg, "%x", &bits) != 1)
		xtables_error(PARAMETER_PROBLEM, "Bad mark value `%s'", optarg);
	if (*flags)
		xtables_error(PARAMETER_PROBLEM, "MARK: Can't specify --%s twice",
			      arp_opts[c - ARP_SET].name);
	*flags = 1;

	/* arptables 1.8.9 leaves the mask of --set-mark alone; so must -D here. */
	if (c == ARP_SET)
		info->mark = bits;
	else if (c == ARP_AND)
		*info = (struct xt_mark_tginfo2){0, ~bits};
	else
		*info = (struct xt_mark_tginfo2){bits, bits};
	return 1;
}

static void arp_save(const void *ip __unused, const struct xt_entry_target *t)
{
	const struct xt_mark_tginfo2 *info = (const void *)t->data;

	if (info->mark == 0)
		printf(" --and-mark %x", ~info->mask);
	else if (info->mark == info->mask)
		printf(" --or-mark %x", info->mark);
	else
		printf(" --set-mark %x", info->mark);
}

static void arp_print(const void *ip, const struct xt_entry_target *t, int numeric __unused)
{
	arp_save(ip, t);
}

/* -- registration --------------------------------------------------------- */

#define STOCK_SIZE	XT_ALIGN(sizeof(struct xt_mark_tginfo2))

static struct xtables_target stock_reg[] = {
	{
		.version	= XTABLES_VERSION,
		.name		= "MARK",
		.revision	= STOCK_REVISION,
		.family		= NFPROTO_UNSPEC,
		.size		= STOCK_SIZE,
		.userspacesize	= STOCK_SIZE,
		.help		= mark_help,
		.x6_parse	= stock_parse,
		.x6_fcheck	= mark_check,
		.x6_options	= mark_opts,
		.print		= mark_print,
		.save		= mark_save,
		.xlate		= mark_xlate,
	},
	{
		.version	= XTABLES_VERSION,
		.name		= "MARK",
		.revision	= STOCK_REVISION,
		.family		= NFPROTO_ARP,
		.size		= STOCK_SIZE,
		.userspacesize	= STOCK_SIZE,
		.help		= stock_help,
		.parse		= arp_parse,
		.extra_opts	= arp_opts,
		.print		= arp_print,
		.save		= arp_save,
	},
};

static struct xtables_target copyxid_reg = {
	.version	= XTABLES_VERSION,
	.name		= "MARK",
	.revision	= XT_MARK_COPYXID_REVISION,
	.family		= NFPROTO_UNSPEC,
	.size		= XT_ALIGN(sizeof(struct xt_mark_copyxid_tginfo)),
	.userspacesize	= STOCK_SIZE,
	.help		= mark_help,
	.x6_parse	= copyxid_parse,
	.x6_fcheck	= mark_check,
	.x6_options	= mark_opts,
	.print		= mark_print,
	.save		= mark_save,
	.xlate		= mark_xlate,
};

/* The way the running program asks: raw socket (legacy) or nft_compat. */
static bool in_kernel(uint8_t revision)
{
	return xt_params->compat_rev("MARK", revision, afinfo->so_rev_target);
}

/*
 * Without CAP_NET_RAW libxtables' own question fails, is answered "yes", and
 * says so on standard error each time. Only --help is left to such a process.
 */
static bool may_ask(void)
{
	int fd;

	if (xt_params->compat_rev != xtables_compatible_revision)
		return true;
	fd = socket(afinfo->family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
	if (fd < 0)
		return false;
	close(fd);
	return true;
}

void _init(void)
{
	if (afinfo->family != NFPROTO_IPV4 && afinfo->family != NFPROTO_IPV6) {
		xtables_register_targets(stock_reg, ARRAY_SIZE(stock_reg));
		return;
	}
	if (may_ask()) {
		if (!in_kernel(XT_MARK_COPYXID_REVISION)) {
			/* An offer it must refuse would warn at every further rule. */
			xtables_register_targets(stock_reg, ARRAY_SIZE(stock_reg));
			return;
		}
		stock_in_kernel = in_kernel(STOCK_REVISION);
		if (stock_in_kernel) {
			/*
			 * A look-up drops all that is pending below the highest
			 * revision. Have revision 2 looked up while it is the
			 * highest: ours, offered next, goes in front of it.
			 */
			xtables_register_targets(stock_reg, ARRAY_SIZE(stock_reg));
			xtables_find_target("MARK", XTF_DONT_LOAD);
			stock_reg[0].used = 0;	/* or --help prints it twice */
		}
	}
	xtables_register_target(&copyxid_reg);
}
