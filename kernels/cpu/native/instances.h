/* The kernels of every instruction set, and the table from which the caller picks one. */
#define JOIN(name, suffix) name##_##suffix
#define EXPAND(name, suffix) JOIN(name, suffix)
#define ISA(name) EXPAND(name, SUFFIX)

#define SUFFIX portable
#define LANES 4
#define TILE 1
#define TARGET
#include "isa/kernels.h"

#if defined(__x86_64__)
#define SUFFIX avx2
#define LANES 8
#define TILE 8
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#include "isa/kernels.h"

#define SUFFIX avx512
#define LANES 16
#define TILE 8
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512vnni")))
#include "isa/kernels.h"
#endif

#if defined(__aarch64__)
#define SUFFIX neon
#define LANES 4
#define TILE 8
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define DOT_PRODUCTS
#include "isa/kernels.h"
#endif

static int always_supported(void) { return 1; }

#if defined(__x86_64__)
/* Every processor with AVX2 converts float16 and counts bits. */
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
static int has_dot_products(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every Apple processor that runs 64-bit macOS */
#endif
}
#endif

typedef struct {
    const char *name;
    int lanes, max_rows; /* rows of a panel; the largest row block */
    int (*supported)(void);
    void (*pack_inputs)(Product *, RowBlock);
    void (*multiply)(const Product *, int64_t panel, RowBlock);
    void (*dequantize)(const Weight *, int64_t panel, float *out, int64_t stride);
    void (*multiply_pruned)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*multiply_dense)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*to_dense)(const Pruned *, int64_t row, float *out);
    void (*norm)(const float *x, const float *weight, float epsilon, int64_t count, float *y);
    void (*attend)(const Attention *, int64_t head);
    void (*gate)(const float *gates, float *y, int64_t count);
} InstructionSet;

static const InstructionSet INSTRUCTION_SETS[] = {
#if defined(__x86_64__)
    {"avx512-vnni", 16, 8, has_avx512, pack_inputs_avx512, multiply_avx512, dequantize_avx512, multiply_pruned_avx512,
     multiply_dense_avx512, to_dense_avx512, norm_avx512, attend_avx512, gate_avx512},
    {"avx2", 8, 8, has_avx2, pack_inputs_avx2, multiply_avx2, dequantize_avx2, multiply_pruned_avx2,
     multiply_dense_avx2, to_dense_avx2, norm_avx2, attend_avx2, gate_avx2},
#elif defined(__aarch64__)
    {"neon-dotprod", 4, 8, has_dot_products, pack_inputs_neon, multiply_neon, dequantize_neon, multiply_pruned_neon,
     multiply_dense_neon, to_dense_neon, norm_neon, attend_neon, gate_neon},
#endif
    {"portable", 4, 1, always_supported, pack_inputs_portable, multiply_portable, dequantize_portable, multiply_pruned_portable,
     multiply_dense_portable, to_dense_portable, norm_portable, attend_portable, gate_portable},
};

enum { INSTRUCTION_SET_COUNT = sizeof INSTRUCTION_SETS / sizeof *INSTRUCTION_SETS };
