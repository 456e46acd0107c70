/* Work on several threads. */
/*
 * If the process has torch's OpenMP runtime, that one is used: its threads stay awake after a product of torch, on the cores
 * that other threads would need. Otherwise a pool is used, which grows to the largest number of threads requested. Its workers
 * spin for a moment before they sleep, because the next layer of a model follows within microseconds. A worker that has not
 * started by the time all indices are taken is not waited for: on a busy machine it may wake late. One product at a time owns
 * the pool; a second one that arrives from another thread meanwhile runs on its own thread alone.
 */
typedef void (*Work)(void *context, int64_t index);

typedef struct {
    Work work;
    void *context;
    int64_t count, grain; /* indices, and how many of them a thread takes at a time */
    _Atomic int64_t next;
} Job;

static struct {
    pthread_mutex_t owner, lock;
    pthread_cond_t wake;
    int workers, wanted, forked;
    Job *job;
    _Atomic int running;
    _Atomic unsigned round;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#if defined(__linux__)
extern void GOMP_parallel(void (*work)(void *), void *context, unsigned threads, unsigned flags) __attribute__((weak));
#endif

/* A grain of neighbouring indices is memory that is read in order; a thread gets several, because another may wake late. */
enum { SPINS = 4000, GRAINS_PER_THREAD = 4 };

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void run_grains(void *given) {
    Job *job = given;
    int64_t first;
    while ((first = atomic_fetch_add(&job->next, job->grain)) < job->count)
        for (int64_t i = first; i < min64(first + job->grain, job->count); i++) job->work(job->context, i);
}

static void *worker(void *number) {
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.round) == seen; spin++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.round);
        int joins = (intptr_t)number < pool.wanted;
        Job *job = pool.job;
        if (joins) atomic_fetch_add(&pool.running, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!joins) continue;
        run_grains(job);
        atomic_fetch_sub(&pool.running, 1);
    }
    return NULL;
}

/* A forked child has the memory of the pool and of OpenMP, but not their threads. */
static void reset_after_fork(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = pool.wanted = 0;
    pool.forked = 1;
    atomic_store(&pool.running, 0);
    atomic_store(&pool.round, 0);
}

__attribute__((constructor)) static void register_fork_handler(void) { pthread_atfork(NULL, NULL, reset_after_fork); }

/* Start a worker; called while the pool is idle. Returns whether it started. */
static int start_worker(void) {
    pthread_t thread;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &detached, worker, (void *)(intptr_t)pool.workers);
    pthread_attr_destroy(&detached);
    if (!failed) pool.workers++;
    return !failed;
}

/* Run the job on OpenMP's threads if there are any. Returns whether it ran. */
static int ran_on_openmp(Job *job, int threads) {
#if defined(__linux__)
    if (GOMP_parallel && !pool.forked) {
        GOMP_parallel(run_grains, job, (unsigned)threads, 0);
        return 1;
    }
#endif
    (void)job, (void)threads;
    return 0;
}

/* Call work(context, i) once for each i in 0 .. count - 1, on up to `threads` threads including this one. */
static void parallel(int threads, int64_t count, Work work, void *context) {
    if (threads > count) threads = (int)count;
    int64_t grain = threads > 1 ? ceil_div(count, threads * GRAINS_PER_THREAD) : count;
    Job job = {.work = work, .context = context, .count = count, .grain = grain};
    if (threads > 1 && ran_on_openmp(&job, threads)) return;
    if (threads < 2 || pthread_mutex_trylock(&pool.owner)) {
        run_grains(&job);
        return;
    }
    while (pool.workers < threads - 1 && start_worker()) continue;
    pthread_mutex_lock(&pool.lock);
    pool.job = &job;
    pool.wanted = threads - 1;
    atomic_fetch_add(&pool.round, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    run_grains(&job);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; atomic_load(&pool.running); spin++)
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.owner);
}
