"""Checkpoints: the state of a training in one file, written whole or not at all, and checked to the last bit.

A checkpoint is an uncompressed .npz archive. Its first member ``state.json`` holds everything but the arrays; in it,
``{"__array__": i}`` stands for the array in the member ``i.npy``. The archive's comment, the last bytes of the file, is
the format's version and the SHA-256 of every byte before it. Nothing in a file depends on the clock: the same state is
the same bytes.

# Design:
# - No pickle, no compression: whatever a file claims, what is read from it takes no more memory than the file on disk
#   (for the JSON text, a small multiple, so its size has a limit of its own).
# - The checksum covers headers and padding too, which zip's own CRC does not; it is verified before anything is parsed.
#   It finds damage, not malice: everything behind it is checked as if it had been written by an enemy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._arrays import Array, as_array, has_protocol

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["load", "restore", "save"]

VERSION = 1
SEAL = b"fastnorm checkpoint %d sha256 " % VERSION  # followed by the digest in hexadecimal, 64 characters
ANY_VERSION = re.compile(rb"fastnorm checkpoint (\d{1,9}) ")
DIGEST_LENGTH = 64
TEXT = "state.json"
MAX_TEXT = 1 << 24  # bytes of it: parsed, JSON takes up to 25 times its length
ARRAY = "__array__"
KINDS = "biufc"  # of arrays: bool, integers, floats, complex
CHUNK = 1 << 20


# -- to and from JSON --------------------------------------------------------------------------------------------------


def _pack(name: str, value: Any, arrays: list[Array]) -> Any:
    """``value`` as JSON can say it; its arrays are appended to ``arrays``."""
    if has_protocol(value):
        value = as_array(name, value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in KINDS or isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__} of dtype {value.dtype}")
        arrays.append(value)
        return {ARRAY: len(arrays) - 1}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected keys that are strings, got {key!r}")
        if ARRAY in value:
            raise ValueError(f"{name}: expected another key than {ARRAY!r}, which the format uses itself")
        return {key: _pack(f"{name}.{key}", item, arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(f"{name}[{i}]", item, arrays) for i, item in enumerate(value)]
    plain = value.item() if isinstance(value, np.generic) else value
    if plain is not None and not isinstance(plain, (bool, int, float, str)):
        raise TypeError(f"{name}: expected arrays, numbers, strings, None, and dicts or lists of these, "
                        f"got {type(value).__name__}")
    return plain


def _unpack(value: Any, arrays: dict[int, Array]) -> Any:
    """Inverse of `_pack`; each array is taken out of ``arrays``, by its number."""
    if isinstance(value, dict):
        if ARRAY in value:
            if value[ARRAY] not in arrays:
                raise ValueError(f"it has no array {value[ARRAY]}, or refers to it twice")
            return arrays.pop(value[ARRAY])
        return {key: _unpack(item, arrays) for key, item in value.items()}
    return [_unpack(item, arrays) for item in value] if isinstance(value, list) else value


# -- the seal ----------------------------------------------------------------------------------------------------------


def _digest(file: BinaryIO, n: int) -> bytes:
    """SHA-256 of the first ``n`` bytes, in hexadecimal."""
    sha = hashlib.sha256()
    file.seek(0)
    while n > 0 and (chunk := file.read(min(CHUNK, n))):
        sha.update(chunk)
        n -= len(chunk)
    return sha.hexdigest().encode()


def _check_seal(file: BinaryIO) -> None:
    """Require the version and the checksum at the end of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(SEAL) - DIGEST_LENGTH))
    seal, digest = (end := file.read())[:-DIGEST_LENGTH], end[-DIGEST_LENGTH:]
    if seal != SEAL:
        if (other := ANY_VERSION.search(end)) and int(other[1]) != VERSION:
            raise ValueError(f"expected version {VERSION} of the format, got {int(other[1])}")
        raise ValueError("it does not end as one")
    if digest != _digest(file, size - DIGEST_LENGTH):
        raise ValueError("its checksum does not match")


# -- save --------------------------------------------------------------------------------------------------------------


def _write(file: BinaryIO, text: bytes, arrays: list[Array]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(TEXT), text)
        for i, a in enumerate(arrays):
            with archive.open(zipfile.ZipInfo(f"{i}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(a), version=(1, 0), allow_pickle=False)
        archive.comment = SEAL + bytes(DIGEST_LENGTH)  # the digest's place
    digest = _digest(file, file.seek(0, os.SEEK_END) - DIGEST_LENGTH)
    file.seek(-DIGEST_LENGTH, os.SEEK_END)
    file.write(digest)


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a loss of power, where the system can and lets us."""
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:  # a folder may be written to and not read
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it has no such thing
                raise
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Take a file for as long as it is open; False if another one has it and we do not wait, or without locks here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def _temporary(target: Path) -> Iterator[BinaryIO]:
    """A new file beside the target, of a name that nobody else has: not another thread, container or machine, and not a
    signal handler that saves while this thread does. It is locked, so that one that is not has been left behind by a
    process that was killed, and is removed.
    """
    start = "." + os.fsdecode(os.fsencode(target.name)[:200])
    ours = re.compile(re.escape(start) + r"\.[0-9a-f]{16}\.tmp")
    for entry in os.scandir(target.parent):
        if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            with suppress(OSError), open(entry.path, "rb") as abandoned:
                if _lock(abandoned.fileno(), wait=False):
                    os.unlink(entry.path)
    while True:
        path = target.with_name(f"{start}.{secrets.token_hex(8)}.tmp")
        with open(path, "x+b") as file:
            try:
                # Somebody who takes it for an abandoned one has the lock until the name is gone.
                _lock(file.fileno(), wait=True)
                if fcntl is None or path.exists():
                    yield file
                    return
            finally:
                path.unlink(missing_ok=True)


def save(path: str | os.PathLike[str], /, **states: Any) -> None:
    """Write states to a file, which is the old one or the new one at any moment, never half of one.

    The file is written beside its destination under another name, flushed to the disk, and renamed; then the folder is
    flushed. A process that is killed meanwhile may leave the unfinished file, ``.NAME.NUMBER.tmp``; the next call that
    saves to the same name removes it, on systems that have ``flock``.

    Parameters
    ----------
    path : str or path
        Name of the file, used as it is; an existing file is replaced, and its permissions are kept. A symbolic link is
        followed.
    **states : object
        What to save, by name: layers, optimizers and other objects with a ``state_dict`` method, or values: arrays of
        numbers of any dtype and shape, numbers, strings, None, and dicts and lists of these.

    Raises
    ------
    TypeError
        If a value is of another kind, or a key of a dict is no string. The file has not been touched.
    ValueError
        If everything but the arrays exceeds 16 MiB as JSON, a dict or list is within itself, or ``path`` is a device,
        pipe or socket. The file has not been touched.
    OSError
        If the file cannot be written. A file that was there before still is.

    Examples
    --------
    >>> import os, tempfile
    >>> import fastnorm as fn
    >>> model = fn.layers.Dense(4, 3, rng=0)
    >>> optimizer = fn.optim.Adam(model.params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.npz")
    ...     fn.checkpoint.save(path, model=model, optimizer=optimizer, epoch=7)
    ...     fn.checkpoint.restore(path, model=model, optimizer=optimizer)
    {'epoch': 7}
    """
    arrays: list[Array] = []
    try:
        tree = {name: _pack(name, value.state_dict() if hasattr(value, "state_dict") else value, arrays)
                for name, value in states.items()}
        text = json.dumps(tree).encode()
    except RecursionError:
        raise ValueError("states: expected dicts and lists that end, got some within themselves or too deep") from None
    if len(text) > MAX_TEXT:
        raise ValueError(f"states: expected at most {MAX_TEXT} bytes beside the arrays, got {len(text)}")
    target = Path(os.path.realpath(path))  # through a symbolic link, not in its place
    before = os.stat(target) if target.exists() else None
    if before and not stat.S_ISREG(before.st_mode) and not stat.S_ISDIR(before.st_mode):
        raise ValueError(f"{os.fspath(path)}: expected a file, got a device, pipe or socket")
    with _temporary(target) as file:
        if before and os.name == "posix":
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
        _write(file, text, arrays)
        file.flush()
        os.fsync(file.fileno())
        if os.name != "posix":  # elsewhere, an open file cannot be renamed
            file.close()
        os.replace(file.name, target)
    _sync_folder(target.parent)


# -- load --------------------------------------------------------------------------------------------------------------


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """The array of a member, once its header has been found to describe just the bytes that the member has."""
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{info.filename} is of another version of the .npy format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind not in KINDS:
            raise ValueError(f"{info.filename} holds {'pickled objects' if dtype.hasobject else f'dtype {dtype}'}")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
            raise ValueError(f"{info.filename} has {info.file_size - member.tell()} bytes for shape {shape}")
        member.seek(0)
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _read(file: BinaryIO) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if [info.filename for info in members] != [TEXT, *(f"{i}.npy" for i in range(len(members) - 1))]:
            raise ValueError("its members are not those of one")
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
            raise ValueError("its members are compressed")
        if sum(info.file_size for info in members) > file.seek(0, os.SEEK_END):
            raise ValueError("its members overlap")
        if any(info.header_offset < 0 for info in members):  # to seek there would be an OSError, as of a broken disk
            raise ValueError("its members begin before it does")
        if members[0].file_size > MAX_TEXT:
            raise ValueError(f"{TEXT} is larger than {MAX_TEXT} bytes")
        tree = json.loads(archive.read(members[0]))
        arrays = {i: _read_array(archive, info) for i, info in enumerate(members[1:])}
    if not isinstance(tree, dict):
        raise ValueError(f"{TEXT} holds no names")
    state = {name: _unpack(value, arrays) for name, value in tree.items()}
    if arrays:
        raise ValueError("it holds arrays that nothing refers to")
    return state


def load(path: str | os.PathLike[str], /) -> dict[str, Any]:
    """Read what `save` wrote.

    Nothing in the file is executed. It is refused if a single bit has changed since it was written; and whatever it
    claims about itself, no more memory is allocated for arrays than the file has bytes.

    Parameters
    ----------
    path : str or path
        Name of the file.

    Returns
    -------
    dict
        The states by name. Objects have become what their ``state_dict`` returned, and tuples lists; arrays have the
        dtype, shape and bits that they had, numbers and strings their values.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no checkpoint, is damaged, or is of another version; one line that begins with the path.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import fastnorm as fn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "inputs.npz")
    ...     fn.checkpoint.save(path, inputs={"mean": np.array([0.5, 2.0]), "count": 10})
    ...     fn.checkpoint.load(path)
    {'inputs': {'mean': array([0.5, 2. ]), 'count': 10}}
    """
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):  # a pipe would wait, a device never end
        raise ValueError(f"{os.fspath(path)}: expected a file, got a device, pipe or socket")
    with open(path, "rb") as file:
        try:
            _check_seal(file)
            return _read(file)
        except MemoryError:
            raise
        except Exception as error:  # of zip, npy, JSON, or a key: whatever a damaged file provokes
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{os.fspath(path)}: not a fastnorm checkpoint, or a damaged one ({reason})") from None


def restore(path: str | os.PathLike[str], /, **objects: Any) -> dict[str, Any]:
    """Load a file and put the states of several objects back: either all of them change, or none.

    Parameters
    ----------
    path : str or path
        Name of a file that `save` wrote.
    **objects : object
        Layers, optimizers and other objects with ``state_dict`` and ``load_state_dict``, by the names under which they
        were saved.

    Returns
    -------
    dict
        Whatever else the file holds, by name.

    Raises
    ------
    TypeError
        If an object has no ``state_dict`` or ``load_state_dict``.
    OSError, ValueError
        As `load`; and ValueError if a name is not in the file or an object refuses its state (another shape, dtype or
        class). No object has changed then.

    Examples
    --------
    >>> import os, tempfile
    >>> import fastnorm as fn
    >>> model, wider = fn.layers.Dense(4, 3, rng=0), fn.layers.Dense(4, 5, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "run.npz")
    ...     fn.checkpoint.save(path, model=model)
    ...     fn.checkpoint.restore(path, model=wider)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...run.npz: model: state['weight']: expected shape (4, 5), got (4, 3)
    """
    for name, target in objects.items():
        if not hasattr(target, "state_dict") or not hasattr(target, "load_state_dict"):
            raise TypeError(f"{name}: expected an object with state_dict and load_state_dict, "
                            f"got {type(target).__name__}")
    states = load(path)
    if missing := [name for name in objects if name not in states]:
        raise ValueError(f"{os.fspath(path)}: expected a state for {', '.join(missing)}, "
                         f"got {', '.join(states) or 'none'}")
    before = {name: target.state_dict() for name, target in objects.items()}
    try:
        for name, target in objects.items():
            _put_back(f"{os.fspath(path)}: {name}", target, states.pop(name))
    except BaseException:
        for name, target in objects.items():
            target.load_state_dict(before[name])
        raise
    return states


def _put_back(label: str, target: Any, state: Any) -> None:
    """Load a state into its object; what it refuses is wrong in the file."""
    try:
        target.load_state_dict(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label}: {error}") from error
