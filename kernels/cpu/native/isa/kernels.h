/*
 * The kernels of one instruction set: included once per set, which is as near as C comes to a template. The file that includes
 * it defines
 *
 *     SUFFIX        the name of the set, appended to every name in ISA()
 *     LANES         32-bit lanes of a vector, which are rows of a panel
 *     TILE          the largest number of rows of activations in one pass over the codes
 *     TARGET        the attribute that lets a function use the instructions
 *     DOT_PRODUCTS  if the set has Arm's dot products of bytes
 */
#include "vectors.h"
#include "int8_inputs.h"
#include "float_inputs.h"
#include "panels.h"
#include "pruned_rows.h"
#include "block_math.h"

#undef Ints
#undef Words
#undef Floats
#undef SUFFIX
#undef LANES
#undef TILE
#undef TARGET
#undef DOT_PRODUCTS
