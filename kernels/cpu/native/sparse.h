/* Exported: products with sparse matrices in compressed rows. */

typedef float Four __attribute__((vector_size(16)));

typedef struct Sparse {
    const int64_t *starts;
    const void *columns;    /* uint16, or uint32 if `wide` */
    const uint16_t *values; /* float16 */
    const float *x;         /* [m][width], or [width][8] for up to 8 interleaved rows */
    float *y;
    int64_t m, rows, width;
    int wide;
    int *outside; /* set to 1 if a column is not below `width`; such a column is read as the last one */
    float (*dot)(const struct Sparse *, int64_t start, int64_t end);
} Sparse;

enum { SPARSE_ROWS = 64, SPARSE_PREFETCH = 256 };

INLINE int64_t sparse_column(const Sparse *s, int64_t i) {
    int64_t column = s->wide ? ((const uint32_t *)s->columns)[i] : ((const uint16_t *)s->columns)[i];
    if (__builtin_expect(column < s->width, 1)) return column;
    __atomic_store_n(s->outside, 1, __ATOMIC_RELAXED);
    return s->width - 1;
}

/* Four sums at a time: their loads are independent, and this loop does little but wait for loads. */
static float sparse_dot(const Sparse *s, int64_t i, int64_t end) {
    float sum[4] = {0};
    for (; i + 4 <= end; i += 4)
        for (int j = 0; j < 4; j++) sum[j] += half_to_float(s->values[i + j]) * s->x[sparse_column(s, i + j)];
    for (; i < end; i++) sum[0] += half_to_float(s->values[i]) * s->x[sparse_column(s, i)];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

#if defined(__x86_64__)
/* Eight entries at a time. */
__attribute__((target("avx2,fma,f16c"))) static float sparse_dot_avx2(const Sparse *s, int64_t i, int64_t end) {
    __m256 sum = _mm256_setzero_ps();
    __m256i last = _mm256_set1_epi32((int32_t)(s->width - 1)), highest = _mm256_setzero_si256();
    for (; i + 8 <= end; i += 8) {
        __builtin_prefetch(s->values + i + SPARSE_PREFETCH);
        __m256i columns;
        if (s->wide)
            columns = _mm256_loadu_si256((const __m256i *)((const uint32_t *)s->columns + i));
        else
            columns = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)((const uint16_t *)s->columns + i)));
        highest = _mm256_max_epu32(highest, columns);
        columns = _mm256_min_epu32(columns, last);
        __m256 values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s->values + i)));
        sum = _mm256_fmadd_ps(values, _mm256_i32gather_ps(s->x, columns, 4), sum);
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(highest, last), last)) != -1)
        __atomic_store_n(s->outside, 1, __ATOMIC_RELAXED);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four))) + sparse_dot(s, i, end);
}
#endif

/* The same for 8 interleaved rows: entries with even and with odd indices have separate sums, for the same reason. */
INLINE void sparse_dots(const Sparse *s, int64_t i, int64_t end, float *sums) {
    Four sum[4] = {{0}};
    for (; i < end; i += 2)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (i + j / 2 >= end) break;
            Four x;
            memcpy(&x, s->x + 8 * sparse_column(s, i + j / 2) + 4 * (j % 2), sizeof x);
            sum[j] += half_to_float(s->values[i + j / 2]) * x;
        }
    sum[0] += sum[2];
    sum[1] += sum[3];
    memcpy(sums, sum, 2 * sizeof(Four));
}

static void sparse_share(void *context, int64_t share) {
    const Sparse *s = context;
    int64_t last = min64(s->rows, (share + 1) * SPARSE_ROWS);
    for (int64_t row = share * SPARSE_ROWS; row < last; row++) {
        if (s->m == 1) {
            s->y[row] += s->dot(s, s->starts[row], s->starts[row + 1]);
            continue;
        }
        float sums[8];
        sparse_dots(s, s->starts[row], s->starts[row + 1], sums);
        for (int64_t r = 0; r < s->m; r++) s->y[r * s->rows + row] += sums[r];
    }
}

/* y[m][rows] += x[m][width] S^T for S in compressed rows: starts[rows + 1], columns (uint32 if `wide`, else uint16)
 * and float16 values of its `entries`. Returns 0, -1 if there is no memory for interleaved rows of x, or -2 if starts do not
 * ascend from 0 to `entries` or a column is not below `width`; nothing outside the matrices is read or written then. */
int lmpress_add_sparse(int threads, const int64_t *starts, const void *columns, int wide, const uint16_t *values,
                       int64_t entries, int64_t rows, int64_t width, const float *x, int64_t m, float *y) {
    if (starts[0] != 0 || starts[rows] != entries || (entries && width < 1)) return -2;
    for (int64_t row = 0; row < rows; row++)
        if (starts[row] > starts[row + 1]) return -2;
    int outside = 0;
    float (*dot)(const Sparse *, int64_t, int64_t) = sparse_dot;
#if defined(__x86_64__)
    if (has_avx2()) dot = sparse_dot_avx2; /* it has F16C too */
#endif
    float *interleaved = m > 1 ? malloc((size_t)width * 8 * sizeof(float)) : NULL;
    if (m > 1 && !interleaved) return -1;
    for (int64_t done = 0; done < m; done += 8, x += 8 * width, y += 8 * rows) {
        Sparse sparse = {starts, columns, values, x, y, min64(8, m - done), rows, width, wide, &outside, dot};
        if (sparse.m > 1) {
            sparse.x = interleaved;
            for (int64_t k = 0; k < width; k++)
                for (int64_t r = 0; r < 8; r++) interleaved[8 * k + r] = r < sparse.m ? x[r * width + k] : 0;
        }
        int used = (double)starts[rows] * (double)sparse.m < 1 << 16 ? 1 : threads;
        parallel(used, ceil_div(rows, SPARSE_ROWS), sparse_share, &sparse);
    }
    free(interleaved);
    return outside ? -2 : 0;
}
