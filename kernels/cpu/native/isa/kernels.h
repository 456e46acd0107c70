/*
 * The kernels of one instruction set, LANES rows at a time: included once per instruction set, which is as near as C comes to a
 * template. Before it, SUFFIX names the set, LANES is the number of 32-bit lanes of a vector, TILE the number of rows of
 * activations that share a pass (1: no tiles of several), TARGET the attribute that allows the instructions, and DOT_PRODUCTS is
 * defined if Arm's dot products of bytes are among them.
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
