/* Vectors: their types, loads and conversions, products of bytes, look-ups, and the scales and codes of a panel. */

typedef int32_t ISA(Ints) __attribute__((vector_size(4 * LANES)));
typedef uint32_t ISA(Words) __attribute__((vector_size(4 * LANES)));
typedef float ISA(Floats) __attribute__((vector_size(4 * LANES)));
#define Ints ISA(Ints)
#define Words ISA(Words)
#define Floats ISA(Floats)

/* What the vector operators lack: dot products of bytes, and look-ups in a table of 16 floats. */

#if defined(__x86_64__) && LANES == 16

enum { ISA(WHOLE_BYTES) = 1, ISA(CHEAP_TABLE) = 1 };

/* Four products of an unsigned and a signed byte per lane, added to the lane. */
TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return sum; }
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
}

#elif defined(__x86_64__) && LANES == 8

enum { ISA(WHOLE_BYTES) = 0, ISA(CHEAP_TABLE) = 0 };

/* Sums of 16 bits: the instruction saturates, but 8 steps of 2 * 15 * 128 = 3840 stay below 2^15. */
TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
    sum = (Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
    __asm__("" : "+x"(sum)); /* else compilers add up in a tree, whose leaves do not fit the registers */
    return sum;
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
/* Two tables of 8, chosen by the index's fourth bit in the sign. */
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}

#else

enum { ISA(WHOLE_BYTES) = 0, ISA(CHEAP_TABLE) = 0 };

TARGET INLINE Ints ISA(dot)(Ints sum, Words codes, Words x) {
#ifdef DOT_PRODUCTS
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
#else
    for (int byte = 0; byte < 4; byte++) /* codes are at most 15, so that each product fits its 32-bit lane */
        sum += (Ints)((codes >> (8 * byte)) & 0xff) * ((Ints)(x << (24 - 8 * byte)) >> 24);
    return sum;
#endif
}
TARGET INLINE Ints ISA(widen)(Ints sum) { return sum; }
TARGET INLINE Floats ISA(lookup)(const float *table, Words index) {
    return (Floats){table[index[0] & 15], table[index[1] & 15], table[index[2] & 15], table[index[3] & 15]};
}

#endif

/* A table of 16 floats as the kernels hold it, and the four columns of a quad (each byte below 16) looked up in it. */
#if defined(__x86_64__) && LANES == 8

/* Bytes are looked up 32 at a time, in one table per byte of a float; the four results are joined again. */
typedef struct {
    __m256i bytes[4];
} ISA(Table);

TARGET INLINE ISA(Table) ISA(table_from)(const float *values) {
    uint8_t bytes[4][32];
    for (int at = 0; at < 64; at++)
        for (int half = 0; half < 32; half += 16)
            bytes[at % 4][half + at / 4] = (uint8_t)(float_to_bits(values[at / 4]) >> (8 * (at % 4)));
    ISA(Table) table;
    memcpy(table.bytes, bytes, sizeof bytes);
    return table;
}

TARGET INLINE void ISA(lookup_quad)(Floats *columns, const ISA(Table) * table, Words quad) {
    const __m256i rows_together = _mm256_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0,  /* high half */
                                                  15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0); /* low half */
    __m256i index = _mm256_shuffle_epi8((__m256i)quad, rows_together);
    __m256i first = _mm256_shuffle_epi8(table->bytes[0], index), second = _mm256_shuffle_epi8(table->bytes[1], index);
    __m256i third = _mm256_shuffle_epi8(table->bytes[2], index), fourth = _mm256_shuffle_epi8(table->bytes[3], index);
    __m256i low = _mm256_unpacklo_epi8(first, second), low_above = _mm256_unpacklo_epi8(third, fourth);
    __m256i high = _mm256_unpackhi_epi8(first, second), high_above = _mm256_unpackhi_epi8(third, fourth);
    columns[0] = (Floats)_mm256_unpacklo_epi16(low, low_above);
    columns[1] = (Floats)_mm256_unpackhi_epi16(low, low_above);
    columns[2] = (Floats)_mm256_unpacklo_epi16(high, high_above);
    columns[3] = (Floats)_mm256_unpackhi_epi16(high, high_above);
}

#else

typedef struct {
    const float *values;
} ISA(Table);

TARGET INLINE ISA(Table) ISA(table_from)(const float *values) { return (ISA(Table)){values}; }

TARGET INLINE void ISA(lookup_quad)(Floats *columns, const ISA(Table) * table, Words quad) {
    for (int j = 0; j < 4; j++) columns[j] = ISA(lookup)(table->values, quad >> (8 * j));
}

#endif

TARGET INLINE Words ISA(load_words)(const uint8_t *from) {
    Words words;
    memcpy(&words, from, sizeof words);
    return words;
}
TARGET INLINE Floats ISA(load_floats)(const float *from) {
    Floats floats;
    memcpy(&floats, from, sizeof floats);
    return floats;
}
TARGET INLINE Floats ISA(broadcast)(float value) { return value - (Floats){0}; }

/* LANES bytes, each widened to a lane, and four float16 as floats. */
#if defined(__x86_64__) && LANES >= 8
TARGET INLINE Words ISA(load_bytes)(const uint8_t *from) {
#if LANES == 16
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#endif
}
TARGET INLINE void ISA(load_four_halves)(const uint16_t *from, float *four) {
    _mm_storeu_ps(four, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)from)));
}
#else
TARGET INLINE Words ISA(load_bytes)(const uint8_t *from) { return (Words){from[0], from[1], from[2], from[3]}; }
TARGET INLINE void ISA(load_four_halves)(const uint16_t *from, float *four) {
    for (int i = 0; i < 4; i++) four[i] = half_to_float(from[i]);
}
#endif

/* LANES float16 as floats. */
TARGET INLINE Floats ISA(load_halves)(const uint16_t *from) {
#if defined(__x86_64__) && LANES == 16
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__x86_64__) && LANES == 8
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(DOT_PRODUCTS)
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    Floats floats;
    for (int r = 0; r < LANES; r++) floats[r] = half_to_float(from[r]);
    return floats;
#endif
}

TARGET INLINE Floats ISA(load_scales)(const void *from, int64_t at, int half_scales) {
    return half_scales ? ISA(load_halves)((const uint16_t *)from + at) : ISA(load_floats)((const float *)from + at);
}

/* The scales of a panel's rows in group `g`, and their offsets: zero points minus center. */
TARGET INLINE Floats ISA(scale_and_offset)(const Weight *w, int64_t panel, int64_t groups, int64_t g, Floats *offset) {
    int64_t at = panel * groups + g;
    *offset = (Floats){0};
    if (!w->bilevel_codes) {
        if (w->offsets) *offset = ISA(load_scales)(w->offsets, at * LANES, w->half_scales);
        return ISA(load_scales)(w->scales, at * LANES, w->half_scales);
    }
    int64_t tile = panel * LANES / TILE_ROWS * groups + g;
    Words codes = ISA(load_bytes)(w->bilevel_codes + tile * TILE_ROWS + panel * LANES % TILE_ROWS);
    float grid[4];
    ISA(load_four_halves)(w->bilevel_grids + 4 * tile, grid);
    *offset = (__builtin_convertvector((Ints)(codes >> 4), Floats) - grid[3]) * grid[2] - (float)w->center;
    return (__builtin_convertvector((Ints)(codes & 15), Floats) - grid[1]) * grid[0];
}

/* Quad `q` of a block: 4 codes in the 4 bytes of every lane. */
TARGET INLINE Words ISA(quad)(const uint8_t *block, int q, int bits) {
    switch (bits) {
    case 8:
        return ISA(load_words)(block);
    case 4:
        return (ISA(load_words)(block) >> (4 * q)) & 0x0f0f0f0f;
    case 2:
        return (ISA(load_words)(block) >> (2 * q)) & 0x03030303;
    default: {
        Words low = ISA(load_words)(block + q / 4 * 4 * LANES), high = ISA(load_words)(block + 8 * LANES);
        Words third = q < 2 ? high << (2 - q) : high >> (q - 2);
        return ((low >> (2 * (q % 4))) & 0x03030303) | (third & 0x04040404);
    }
    }
}
