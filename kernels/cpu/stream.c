/* Reads memory as fast as one thread can: the upper bound for kernels that do little but read. */
#include <stdint.h>

typedef uint64_t Words __attribute__((vector_size(64)));

uint64_t read_stream(const char *from, int64_t bytes) {
    Words sums[8] = {{0}};
    for (int64_t at = 0; at + (int64_t)sizeof sums <= bytes; at += (int64_t)sizeof sums)
        for (int i = 0; i < 8; i++) sums[i] ^= *(const Words *)(from + at + 64 * i);
    Words all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
    return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}
