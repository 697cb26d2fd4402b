/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _VNET_BIND_H
#define _VNET_BIND_H

#include "mark.h"

#endif /* _VNET_BIND_H */
