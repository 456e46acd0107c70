/* The kernels of every instruction set, and the table from which a caller picks one. */
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

static int always(void) { return 1; }

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
    int lanes, most;
    int (*supported)(void);
    void (*arrange)(Product *, RowBlock);
    void (*multiply)(const Product *, int64_t panel, RowBlock);
    void (*dequantize)(const Weight *, int64_t panel, float *out, int64_t stride);
    void (*multiply_pruned)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*multiply_whole)(const PrunedProduct *, int64_t row, int64_t last, RowBlock);
    void (*unfold)(const Pruned *, int64_t row, float *out);
    void (*norm)(const float *x, const float *weight, float epsilon, int64_t count, float *y);
    void (*attend)(const Attention *, int64_t head);
    void (*gate)(const float *gates, float *y, int64_t count);
} InstructionSet;

static const InstructionSet SETS[] = {
#if defined(__x86_64__)
    {"avx512-vnni", 16, 8, has_avx512, arrange_avx512, multiply_avx512, dequantize_avx512, multiply_pruned_avx512,
     multiply_whole_avx512, unfold_avx512, norm_avx512, attend_avx512, gate_avx512},
    {"avx2", 8, 8, has_avx2, arrange_avx2, multiply_avx2, dequantize_avx2, multiply_pruned_avx2,
     multiply_whole_avx2, unfold_avx2, norm_avx2, attend_avx2, gate_avx2},
#elif defined(__aarch64__)
    {"neon-dotprod", 4, 8, has_dot_products, arrange_neon, multiply_neon, dequantize_neon, multiply_pruned_neon,
     multiply_whole_neon, unfold_neon, norm_neon, attend_neon, gate_neon},
#endif
    {"portable", 4, 1, always, arrange_portable, multiply_portable, dequantize_portable, multiply_pruned_portable,
     multiply_whole_portable, unfold_portable, norm_portable, attend_portable, gate_portable},
};

enum { SET_COUNT = sizeof SETS / sizeof *SETS };
