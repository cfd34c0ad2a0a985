"""Facts about this CPU, this OpenMP runtime and this build. Compiled for the baseline only: it runs before checks."""

cdef extern from "vector.h" nogil:
    int fastnorm_cpu_supports(const char* level)
    int fastnorm_openmp_max_threads()
    int fastnorm_openmp_release_workers()
    int fastnorm_available_cpus()
    int fastnorm_recent_cpus()
    int fastnorm_openmp_version()
    const char* fastnorm_compiler()
    const char* fastnorm_architecture()
    const char* fastnorm_build_flags()
    void* team_own_state()
    void team_share()


def cpu_supports(str level):
    """Whether this CPU and this operating system run code built for ``level``."""
    cdef bytes name = level.encode()
    return fastnorm_cpu_supports(name) != 0


def openmp_max_threads():
    """Threads OpenMP would use in this thread by itself: OMP_NUM_THREADS or the affinity mask when it was loaded, or
    what was set since; 1 without OpenMP.
    """
    return fastnorm_openmp_max_threads()


def openmp_release_workers():
    """End the workers that OpenMP keeps for this thread, before a fork; False where that cannot be done."""
    return fastnorm_openmp_release_workers() != 0


def machine_threads(int most, bint recent):
    """What the machine offers: the least of ``most``, OpenMP's own number, and the CPUs that this thread may run on now
    or, with ``recent``, in the last 10 ms; 1 without OpenMP.
    """
    return min(most, fastnorm_openmp_max_threads(), fastnorm_recent_cpus() if recent else fastnorm_available_cpus())


def openmp_version():
    """Value of the ``_OPENMP`` macro (201511 is OpenMP 4.5), 0 without OpenMP."""
    return fastnorm_openmp_version()


def compiler():
    """Name and version of the compiler."""
    return fastnorm_compiler().decode()


def architecture():
    """The processor family that this build targets."""
    return fastnorm_architecture().decode()


def build_flags():
    """Compiler flags of the baseline build."""
    return fastnorm_build_flags().decode()


def team_state_function():
    """Address of the C function that returns the state of the calling thread's team: one for all kernels."""
    return <size_t> <void*> team_own_state


def share_team():
    """From now on, another library in this process may keep OpenMP's threads awake."""
    team_share()
