/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _VNET_INGRESS_H
#define _VNET_INGRESS_H

#include "mark.h"

#endif /* _VNET_INGRESS_H */
