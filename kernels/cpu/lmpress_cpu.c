/*
 * Matrix products with packed weights, y = x W^T, on CPUs.
 *
 * One file, a plain C ABI, no headers beyond the C library's. It is compiled on first use by whatever compiler the machine
 * has, without machine flags: every instruction set gets its own functions by target attributes, and the caller picks one by
 * number (see the table at the end), so the same library runs on any machine of its architecture.
 *
 * Layout of a weight. A *panel* is LANES output rows, one per 32-bit lane of a vector register; a panel's codes are one
 * contiguous stream along the input columns. Lane r of a vector holds 4 neighbouring columns of row r in its 4 bytes, a
 * *quad*, and several quads of few bits share a byte:
 *
 *     bits   columns per block   vectors per block   quad q of the block
 *       8           4                   1            v[0]
 *       4           8                   1            v[0] >> 4q
 *       2          16                   1            v[0] >> 2q
 *       3          32                   3            low two bits in v[q / 4] >> 2(q % 4), third bit in v[2] >> q
 *
 * So no sum ever crosses lanes, scales are vectors that lie in memory as they are used, and a group of any size is a run of
 * whole blocks: what a group lacks is padded with activations that are zero. Rows beyond the last are padded with zeros.
 *
 *     y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - center - offset[n, g]) * x[m, k])
 *
 * The offset (zero point minus center) leaves the inner sum: it multiplies the group's sum of activations.
 *
 * The kernels are written once, in the second half of this file, with the vector operators that gcc and clang share; the file
 * includes itself once per instruction set, which is as near as C comes to a template.
 */
#include "native/types.h"
#include "native/threads.h"
#include "native/products.h"
#include "native/instances.h"
#include "native/linear.h"
#include "native/pruned.h"
#include "native/decoder_block.h"
#include "native/sparse.h"
