/* Shares of work on several threads. */
/*
 * The OpenMP runtime of torch where the process has one: its threads stay awake after a product of torch's, on the cores that
 * others would need. Elsewhere a pool that grows to the largest number of threads asked for. Its workers spin for a moment
 * before they sleep, because the next layer of a model follows within microseconds. Whoever has not joined by the time the
 * work is taken is not waited for: on a busy machine a worker may wake late. One product at a time owns the pool; a second
 * one that comes from another thread meanwhile does its work alone.
 */
typedef void (*Work)(void *context, int64_t index);

typedef struct {
    Work work;
    void *context;
    int64_t count, run; /* indices, and how many of them a thread takes at a time */
    _Atomic int64_t next;
} Job;

static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake;
    int workers, invited, forked;
    Job *job;
    _Atomic int busy;
    _Atomic unsigned round;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#if defined(__linux__)
extern void GOMP_parallel(void (*work)(void *), void *context, unsigned threads, unsigned flags) __attribute__((weak));
#endif

/* Runs of neighbours are memory that is read on and on; several of them for each thread, because one may wake late. */
enum { SPINS = 4000, RUNS = 4 };

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_shares(void *given) {
    Job *job = given;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next, job->run)) < job->count)
        for (int64_t i = first; i < smaller(first + job->run, job->count); i++) job->work(job->context, i);
}

static void *worker(void *number) {
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.round) == seen; spin++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.round);
        int joins = (intptr_t)number < pool.invited;
        Job *job = pool.job;
        if (joins) atomic_fetch_add(&pool.busy, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!joins) continue;
        take_shares(job);
        atomic_fetch_sub(&pool.busy, 1);
    }
    return NULL;
}

/* A forked child has the memory of the pool, and of OpenMP, but not their threads. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = pool.invited = 0;
    pool.forked = 1;
    atomic_store(&pool.busy, 0);
    atomic_store(&pool.round, 0);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

/* Start a worker that has seen every round so far; called with the pool at rest. */
static int add_worker(void) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, worker, (void *)(intptr_t)pool.workers);
    pthread_attr_destroy(&detached);
    if (!failed) pool.workers++;
    return !failed;
}

/* Whether OpenMP's threads have done the job. */
static int done_by_openmp(Job *job, int threads) {
#if defined(__linux__)
    if (GOMP_parallel && !pool.forked) {
        GOMP_parallel(take_shares, job, (unsigned)threads, 0);
        return 1;
    }
#endif
    (void)job, (void)threads;
    return 0;
}

/* Call work(context, 0 .. count - 1), each index once, on up to `threads` threads including this one. */
static void parallel(int threads, int64_t count, Work work, void *context) {
    if (threads > count) threads = (int)count;
    Job job = {.work = work, .context = context, .count = count, .run = threads > 1 ? ceil_div(count, threads * RUNS) : count};
    if (threads > 1 && done_by_openmp(&job, threads)) return;
    if (threads < 2 || pthread_mutex_trylock(&pool.owner)) {
        take_shares(&job);
        return;
    }
    while (pool.workers < threads - 1 && add_worker()) continue;
    pthread_mutex_lock(&pool.lock);
    pool.job = &job;
    pool.invited = threads - 1;
    atomic_fetch_add(&pool.round, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_shares(&job);
    pthread_mutex_lock(&pool.lock);
    pool.invited = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; atomic_load(&pool.busy); spin++)
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.owner);
}
