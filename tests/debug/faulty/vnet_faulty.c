// SPDX-License-Identifier: GPL-2.0-only
/*
 * vnet_faulty - does one wrong thing when it is loaded
 *
 * For tests of the debug kernel: that it would report what it is there for.
 * It never stays: loading it fails with -EAGAIN.
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Wrong on purpose");

static char *fault = "";
module_param(fault, charp, 0);

static DEFINE_SPINLOCK(lock);

static int __init faulty_init(void)
{
	char *volatile object = kmalloc(100, GFP_KERNEL);

	if (!object)
		return -ENOMEM;
	if (!strcmp(fault, "freed")) {
		kfree(object);
		return READ_ONCE(object[7]) ? -EAGAIN : -EBUSY;
	}
	if (!strcmp(fault, "lost"))	/* nothing refers to it from here on */
		return -EAGAIN;
	if (!strcmp(fault, "sleep")) {
		spin_lock(&lock);
		msleep(1);
		spin_unlock(&lock);
	}
	kfree(object);
	return -EAGAIN;
}
module_init(faulty_init);
