"""What every kernel module has besides its kernels."""

from .vector cimport TeamState, fastnorm_build_flags, team_state


def build_flags():
    """Compiler flags of this level's build."""
    return fastnorm_build_flags().decode()


def share_team_state(size_t function):
    """Take the state of the caller's team from this C function, so that all kernels know of each other's calls."""
    global team_state
    team_state = <TeamState* (*)() noexcept nogil> <void*> function
