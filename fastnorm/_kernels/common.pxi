"""What every kernel module has besides its kernels."""

from .vector cimport TeamState, assume_subnormals, fastnorm_build_flags, team_state

assume_subnormals(-1)


def build_flags():
    """Compiler flags of this level's build."""
    return fastnorm_build_flags().decode()


def share_team_state(size_t function):
    """Take the state of the caller's team from this C function, so that all kernels know of each other's calls."""
    global team_state
    team_state = <TeamState* (*)() noexcept nogil> <void*> function


def assume_slow_subnormals(int slow):
    """1 or 0: whether kernels look for subnormals; -1: where the processor is slow with them. For tests."""
    assume_subnormals(slow)
