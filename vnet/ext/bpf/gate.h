/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _VNET_GATE_H
#define _VNET_GATE_H

#include "mark.h"

#endif /* _VNET_GATE_H */
