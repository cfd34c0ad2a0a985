/* Teams of threads for one call of a kernel, and how they share out its tiles: a part of vector.h, which has said what the
   compiler knows (OpenMP, thread-local storage, `claim`). */

/* -- teams of threads ----------------------------------------------------------------------------------------------- */

/* A call on several threads ends when the last of them does, and libgomp's threads spin, waiting, for about 5 ms before they
   sleep. That makes two cases in which a team costs more than it gives; the caller then works alone. Results do not depend
   on it: they are the same bits for every number of threads.
   - Another process holds one of the cores: a call of 0.1 ms takes a time slice, 4 ms and more, and threads that spin
     between calls lose their claim to the core. The caller measures its longest wait; after a stalled call it works alone
     for a while, longer each time it stalls again, and tries again.
   - The threads sleep, because the last call was long ago. A thread that wakes up is often put on the caller's own core,
     where it waits until the caller has stopped spinning: 5.6 ms for a call that takes 0.04 ms alone. So the first calls
     after a pause are done alone, until they have taken the time that waking the others may cost; from then on the calls
     follow each other closely enough for the others to stay awake. Work that is longer by itself wakes them at once.
     PyTorch shares OpenMP's threads, and so may have kept them awake: it has, if the other threads of this process have
     been at work most of the time since the pause before. Those may have been BLAS' threads, which are others, and to wake
     OpenMP's beside them costs up to 15 ms: then this is not believed again for a while, up to 10 s.
   A team larger than the machine was asked for as such, and always gets its threads. */
#define TEAM_STALL 1e-3 /* seconds; tiles take up to 0.2 ms */
#define TEAM_ALONE 2e-3
#define TEAM_ALONE_MOST 160e-3
#define TEAM_AWAKE 3e-3      /* after a call on several threads */
#define TEAM_WAKING 6e-3     /* what waking may cost */
#define TEAM_BYTES 10e9      /* a second, that one thread gets through */
#define TEAM_DOUBT 0.1
#define TEAM_DOUBT_MOST 10
#define TEAM_BUSY 0.5        /* processor time of other threads, of the time since the last pause */

/* Of one caller (a thread of Python's): shared by all kernels, through `team_state`. */
typedef struct {
    double alone_until, alone;             /* after a stall */
    double team_end, alone_end, alone_sum; /* when each way of working ended last; time worked alone since the pause */
    double paused, others;                 /* after the last pause: the time, and the other threads' processor time */
    double doubt_until, doubt;             /* after a stall of threads that were taken to be awake */
    int shared;                            /* whether PyTorch is there */
} TeamState;

typedef struct {
    int size;
    int watched;          /* for stalls */
    int waiting;          /* alone, because the others sleep */
    int guessed;          /* that they are awake */
    double last, longest; /* when the caller finished its last tile, or began; its longest time between two */
} Team;

static FASTNORM_THREAD_LOCAL TeamState team_own;
static int team_shared;
static TeamState *team_own_state(void) {
    team_own.shared = team_shared;
    return &team_own;
}
static void team_share(void) { team_shared = 1; }
static TeamState *(*team_state)(void) = team_own_state;

#ifdef _OPENMP
/* Processor time of this process' other threads; 0 where the system does not tell. */
static double team_others(void) {
#if defined(CLOCK_PROCESS_CPUTIME_ID) && defined(CLOCK_THREAD_CPUTIME_ID)
    struct timespec all, own;
    if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &all) == 0 && clock_gettime(CLOCK_THREAD_CPUTIME_ID, &own) == 0)
        return (double)(all.tv_sec - own.tv_sec) + 1e-9 * (double)(all.tv_nsec - own.tv_nsec);
#endif
    return 0;
}

/* Called after a pause: whether the other threads were at work since the pause before. */
static int team_is_awake(TeamState *state, double now) {
    const double others = team_others();
    const int awake = others - state->others > TEAM_BUSY * (now - state->paused);
    state->paused = now;
    state->others = others;
    return awake;
}

/* For work that reads and writes so many bytes. */
static Team team_open(int wanted, double bytes) {
    Team team = {wanted, 0, 0, 0, 0, 0};
    if (wanted == 1 || wanted > fastnorm_recent_cpus()) return team;
    TeamState *state = team_state();
    team.last = omp_get_wtime();
    if (team.last < state->alone_until) {
        team.size = 1;
    } else if (team.last - state->team_end < TEAM_AWAKE) {
        team.watched = 1;
    } else {
        if (team.last - state->alone_end > TEAM_AWAKE) {
            state->alone_sum = 0;
            team.guessed = state->shared && team_is_awake(state, team.last) && team.last > state->doubt_until;
            team.watched = team.guessed;
        }
        team.waiting = !team.guessed && state->alone_sum + bytes / TEAM_BYTES < TEAM_WAKING;
        if (team.waiting) team.size = 1;
    }
    return team;
}

/* After each tile. */
static void team_mark(Team *team) {
    if (!team->watched || omp_get_thread_num() != 0) return;
    const double now = omp_get_wtime();
    if (now - team->last > team->longest) team->longest = now - team->last;
    team->last = now;
}

static void team_close(Team *team) {
    TeamState *state = team_state();
    if (team->waiting) {
        state->alone_end = omp_get_wtime();
        state->alone_sum += state->alone_end - team->last;
    } else if (team->watched) {
        team_mark(team); /* the wait for the others */
        if (team->longest > TEAM_STALL) {
            state->alone = state->alone * 2 < TEAM_ALONE ? TEAM_ALONE : state->alone * 2;
            if (state->alone > TEAM_ALONE_MOST) state->alone = TEAM_ALONE_MOST;
            state->alone_until = team->last + state->alone;
        } else {
            state->alone /= 2;
        }
        if (team->guessed) {
            const int wrong = team->longest > TEAM_STALL;
            state->doubt = !wrong ? state->doubt / 2 : state->doubt * 2 < TEAM_DOUBT ? TEAM_DOUBT : state->doubt * 2;
            if (state->doubt > TEAM_DOUBT_MOST) state->doubt = TEAM_DOUBT_MOST;
            if (wrong) state->doubt_until = team->last + state->doubt;
        }
        state->team_end = team->last;
    } else if (team->size > 1) {
        state->team_end = omp_get_wtime();
    }
}
#else
static Team team_open(int wanted, double bytes) {
    (void)wanted;
    (void)bytes;
    Team team = {1, 0, 0, 0, 0, 0};
    return team;
}
static void team_mark(Team *team) { (void)team; }
static void team_close(Team *team) { (void)team; }
#endif

/* -- sharing out tiles ---------------------------------------------------------------------------------------------- */

/* Each thread of a team has a share of the tiles, the same in every call on the same arrays, which then lie in its own
   second-level cache; who is done with that takes from the others' shares. One thread after another takes what is there:
   handed out in the order of asking, half of what a thread works on was in another one's cache (ReLU of 300,000 floats,
   two threads: 40 us against 20). */
enum { SHARES = 64 }; /* threads beyond that share shares */
typedef struct {
    ptrdiff_t next, end;
    char apart[64 - 2 * sizeof(ptrdiff_t)]; /* a cache line each */
} Share;
typedef struct {
    int n;
    Share share[SHARES];
} Shares;
typedef struct {
    int from, left; /* the share to take from, and how many there are with it that may have something */
} Turn;

/* Threads of the parallel region around the call, to be asked only directly in one of ours: outside, the region may be that of
   whoever called Python. OpenMP may give fewer threads than were asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC). */
static int team_present(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* Waits until the `present` threads of the region are all here. One alone waits for nobody. */
static void team_barrier(int present) {
    if (present == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* Shares of equal numbers of tiles. */
static void share_out(Shares *shares, ptrdiff_t tiles, int threads) {
    shares->n = threads < SHARES ? threads : SHARES;
    for (int i = 0; i < shares->n; i++) {
        shares->share[i].next = tiles * i / shares->n;
        shares->share[i].end = tiles * (i + 1) / shares->n;
    }
}

static Turn turn_of(const Shares *shares, int thread) {
    Turn turn = {thread % shares->n, shares->n};
    return turn;
}

/* The next tile for a thread, or -1. */
static ptrdiff_t next_tile(Shares *shares, Turn *turn) {
    for (; turn->left; turn->left--) {
        Share *share = shares->share + turn->from;
        const ptrdiff_t tile = claim(&share->next);
        if (tile < share->end) return tile;
        turn->from = (turn->from + 1) % shares->n;
    }
    return -1;
}
