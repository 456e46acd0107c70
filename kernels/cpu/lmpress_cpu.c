/*
 * Matrix products with packed weights, y = x W^T, on CPUs.
 *
 * One translation unit with a plain C interface and no headers but its own and the C library's. It is compiled on first use by
 * any compiler that the machine has, without machine flags: every instruction set gets its own functions by target attributes,
 * and the caller picks one by number (see native/instances.h), so the same library runs on any machine of its architecture.
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
 * So sums never cross lanes, scales are vectors that lie in memory as they are used, and a group of any size is a run of whole
 * blocks: the missing columns of a group are padded with activations that are zero, missing rows of the last panel with zeros.
 *
 *     y[m, n] = sum over groups g of scale[n, g] * (sum over k in g of (code[n, k] - center - offset[n, g]) * x[m, k])
 *
 * The offset (zero point minus center) is taken out of the inner sum: it multiplies the group's sum of activations.
 *
 * The kernels in native/isa/ are written once, with the vector operators that gcc and clang share, and are included once per
 * instruction set.
 */
#include "native/types.h"
#include "native/threads.h"
#include "native/products.h"
#include "native/instances.h"
#include "native/linear.h"
#include "native/pruned.h"
#include "native/decoder_block.h"
#include "native/sparse.h"
