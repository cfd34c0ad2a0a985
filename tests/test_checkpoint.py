"""Checkpoints: what was saved comes back, and a file that is damaged, hostile or half written is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastnorm as fn
from fastnorm import checkpoint
from fastnorm.layers import BatchNorm, Dense, Dropout, Sequential, SoftmaxCrossEntropy

KILLS = 200


class Training:
    """A small network whose next step depends on everything that a checkpoint must hold."""

    def __init__(self):
        weights = np.random.default_rng(0)
        self.model = Sequential(Dense(8, 16, rng=weights), BatchNorm(16, activation="relu"), Dropout(0.2, seed=1),
                                Dense(16, 3, rng=weights))
        self.criterion = SoftmaxCrossEntropy()
        self.optimizer = fn.optim.Adam(self.model.params, lr=0.01, amsgrad=True, nonfinite="skip")
        self.rng = np.random.default_rng(2)
        self.steps = 0

    def advance(self, steps=1):
        for _ in range(steps):
            x = self.rng.standard_normal((12, 8), dtype=np.float32)
            self.criterion.forward(self.model.forward(x), self.rng.integers(0, 3, 12))
            self.model.backward(self.criterion.backward())
            self.optimizer.step(self.model.grads)
            self.steps += 1

    def save(self, path):
        checkpoint.save(path, model=self.model, optimizer=self.optimizer, rng=self.rng.bit_generator.state,
                        steps=self.steps)

    def restore(self, path):
        rest = checkpoint.restore(path, model=self.model, optimizer=self.optimizer)
        self.rng.bit_generator.state, self.steps = rest["rng"], rest["steps"]

    def everything(self):
        return self.model.state_dict(), self.optimizer.state_dict(), self.rng.bit_generator.state, self.steps


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.npz"


def refusal(path, call=checkpoint.load, **objects):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the caller looks at the message
        call(path, **objects)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_values_come_back_as_they_were(file):
    saved = {"numbers": [0.1, -0.0, 1e-323, float("inf"), 2**127, True, None, "text µ\n\ud800"],
             "scalars": {"a": np.float32(0.1), "b": np.uint64(2**64 - 1), "c": np.bool_(True)},
             "empty": {}, "nested": {"0.weight": {"0": {"weight": []}}, "": 1}, "pair": (0.9, 0.999)}
    checkpoint.save(file, **saved)
    assert checkpoint.load(file) == saved | {"pair": [0.9, 0.999]}
    assert {type(value) for value in checkpoint.load(file)["scalars"].values()} == {float, int, bool}


@pytest.mark.parametrize("dtype", ["?", "b", "B", "<i8", ">i4", "e", "f", "d", "g", "F", ">c16"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (5, 3, 2)], ids=str)
def test_arrays_come_back_bit_for_bit(file, dtype, shape, rng):
    n = int(np.prod(shape))
    a = rng.integers(0, 2 if dtype == "?" else 127, n).astype(dtype).reshape(shape)
    checkpoint.save(file, one=a, nested={"two": [a.T, a]})
    loaded = checkpoint.load(file)
    for b, c in ((loaded["one"], a), (loaded["nested"]["two"][0], a.T), (loaded["nested"]["two"][1], a)):
        assert (b.dtype, b.shape, b.tobytes()) == (c.dtype, c.shape, c.tobytes())
        assert b.flags.writeable


def test_nan_keeps_its_payload_and_any_layout_its_values(file, layout, rng):
    bits = rng.integers(0, 2**32, (4, 6), np.uint32)
    bits[0, :2] = 0x7FC12345, 0xFF800001  # NaN with a payload, a signaling one
    a = layout(bits.view(np.float32))
    checkpoint.save(file, a=a)
    np.testing.assert_array_equal(checkpoint.load(file)["a"].copy("C").view(np.uint32), bits)


def test_the_same_state_is_the_same_bytes_and_numpy_reads_it(file, tmp_path):
    one, two = Training(), Training()
    one.save(file)
    time.sleep(0.01)
    two.save(tmp_path / "again.npz")
    assert file.read_bytes() == (tmp_path / "again.npz").read_bytes()
    with np.load(file) as archive:
        tree = json.loads(archive["state.json"])
        np.testing.assert_array_equal(archive[str(tree["model"]["0.weight"]["__array__"])], one.model[0].weight)


def test_training_goes_on_with_the_bits_of_one_that_never_stopped(file):
    whole = Training()
    whole.advance(9)
    part = Training()
    part.advance(4)
    part.save(file)
    part.advance(2)  # lost
    again = Training()
    again.restore(file)
    again.advance(5)
    np.testing.assert_equal(again.everything(), whole.everything())


@pytest.mark.parametrize(("states", "error", "message"), [
    ({"a": {"b": object()}}, TypeError, "a.b: expected arrays, numbers, strings, None, and dicts or lists of these, "
                                        "got object"),
    ({"a": [1, 2j]}, TypeError, "a[1]: expected arrays, numbers, strings, None, and dicts or lists of these, "
                                "got complex"),
    ({"a": np.longdouble(1)}, TypeError, "a: expected arrays, numbers"),
    ({"a": {"b": np.array([None])}}, TypeError, "a.b: expected an array of numbers, got ndarray of dtype object"),
    ({"a": np.array(["text"])}, TypeError, "a: expected an array of numbers, got ndarray of dtype <U4"),
    ({"a": np.ma.masked_array([1.0])}, TypeError, "a: expected an array of numbers, got MaskedArray"),
    ({"a": {1: 2}}, TypeError, "a: expected keys that are strings, got 1"),
    ({"a": {"__array__": 0}}, ValueError, "a: expected another key than '__array__'"),
    ({"a": "x" * (1 << 24)}, ValueError, "states: expected at most 16777216 bytes beside the arrays, got 16777"),
], ids=["object", "complex", "longdouble", "objects", "strings", "masked", "key", "reserved", "long"])
def test_what_cannot_be_saved(file, states, error, message):
    checkpoint.save(file, epoch=1)
    with pytest.raises(error) as caught:
        checkpoint.save(file, **states)
    assert str(caught.value).startswith(message)
    assert checkpoint.load(file) == {"epoch": 1}
    assert os.listdir(file.parent) == ["run.npz"]


# -- restoring several objects -----------------------------------------------------------------------------------------


def test_restore_returns_what_the_objects_leave(file):
    training = Training()
    training.save(file)
    assert list(checkpoint.restore(file, optimizer=training.optimizer)) == ["model", "rng", "steps"]
    assert list(checkpoint.restore(file)) == ["model", "optimizer", "rng", "steps"]


def spoiled(training, **changes):
    states = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    return {name: {**states[name], **changes.get(name, {})} for name in states}


SPOILED = [
    ({"model": {"3.bias": np.zeros(4, np.float32)}}, "model: state['3.bias']: expected shape (3,), got (4,)"),
    ({"model": {"3.bias": np.zeros(3)}}, "model: state['3.bias']: expected dtype float32, got float64"),
    ({"model": {"3.bias": 0.0}}, "model: state['3.bias']: expected a numpy.ndarray, got float"),
    ({"model": {"4.bias": np.zeros(3)}}, "model: state: unexpected 4.bias"),
    ({"optimizer": {"optimizer": "SGD"}}, "optimizer: state: expected the state of Adam, got that of SGD"),
    ({"optimizer": {"exp_avgs": []}}, "optimizer: exp_avgs: expected 6 arrays as in params, got 0"),
    ({"optimizer": {"step": -1}}, "optimizer: step: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")], ids=" then ".join)
@pytest.mark.parametrize(("changes", "message"), SPOILED, ids=[row[1][-40:] for row in SPOILED])
def test_all_objects_change_or_none(file, changes, message, order):
    """Also the one whose state fits and that comes first."""
    source, training = Training(), Training()
    source.advance(3)
    checkpoint.save(file, **spoiled(source, **changes))
    before = training.everything()
    objects = {"model": training.model, "optimizer": training.optimizer}
    assert refusal(file, checkpoint.restore, **{name: objects[name] for name in order}) == message
    np.testing.assert_equal(training.everything(), before)


def test_an_interrupt_between_two_objects_takes_the_first_one_back(file):
    class Interrupted:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            if state:
                raise KeyboardInterrupt

    source, training = Training(), Training()
    source.advance(2)
    checkpoint.save(file, model=source.model, last={"a": 1})
    before = training.everything()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.restore(file, model=training.model, last=Interrupted())
    np.testing.assert_equal(training.everything(), before)


def test_restore_of_what_is_not_there(file):
    training = Training()
    checkpoint.save(file, model=training.model)
    message = refusal(file, checkpoint.restore, model=training.model, optimizer=training.optimizer)
    assert message == "expected a state for optimizer, got model"
    with pytest.raises(TypeError, match="epoch: expected an object with state_dict and load_state_dict, got int"):
        checkpoint.restore(file, epoch=3)


# -- damaged files -----------------------------------------------------------------------------------------------------

DAMAGED = "not a fastnorm checkpoint, or a damaged one ("


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a checkpoint with a few arrays."""
    path = tmp_path_factory.mktemp("good") / "run.npz"
    checkpoint.save(path, model=Dense(3, 2, rng=0), epoch=1, empty=np.zeros((0, 2)))
    return path.read_bytes()


def test_every_flipped_bit_is_found(file, good):
    training = Dense(3, 2, rng=1)
    before = training.state_dict()
    file.write_bytes(good)
    with open(file, "r+b", buffering=0) as disk:
        for at, byte in enumerate(good):
            disk.seek(at)
            disk.write(bytes([byte ^ 1 << at % 8]))
            assert refusal(file, checkpoint.restore, model=training).startswith(DAMAGED)
            disk.seek(at)
            disk.write(bytes([byte]))
    np.testing.assert_equal(training.state_dict(), before)
    print(f"{len(good)} files with one bit flipped, each at another byte: all refused")


def test_every_truncation_is_found(file, good):
    for more in (b"\0", b"PK", b"0" * 64):
        file.write_bytes(good + more)
        assert refusal(file).startswith(DAMAGED)
    for n in reversed(range(len(good))):
        os.truncate(file, n)
        assert refusal(file).startswith(DAMAGED)
    print(f"{len(good)} truncated files: all refused")


def sealed(content):
    """The bytes with the checksum that belongs to them: what an enemy would write."""
    return content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode()


def test_damage_behind_the_right_checksum_is_refused_or_harmless(file, good):
    """What zip, npy and JSON make of it never shows."""
    rng = random.Random(3)
    messages = []
    file.touch()
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(good) - 64)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            at = rng.randrange(len(good) - 64)
            del damaged[at:min(at + rng.randrange(40), len(good) - 64)]
        content = sealed(bytes(damaged))
        with open(file, "r+b") as disk:  # a file that is emptied first costs milliseconds
            disk.write(content)
            disk.truncate()
        try:
            assert isinstance(checkpoint.load(file), dict)
        except ValueError as error:
            messages.append(str(error))
    print(f"3000 damaged files with the right checksum: {len(messages)} refused")
    assert len(messages) > 1000
    assert all(message.startswith(f"{file}: ") and "\n" not in message for message in messages)


# -- hostile files -----------------------------------------------------------------------------------------------------


class Pickled:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path("unpickled").absolute()),)


def npy(array, version=(1, 0)):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), version)
    return stream.getvalue()


def header(shape, descr="<f8"):
    """An .npy header alone."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


ONE = '{"a": {"__array__": 0}}'


def forged(*members, text=ONE, compression=zipfile.ZIP_STORED, name="state.json"):
    """A file with the right seal around any members, `(name, bytes)`."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        archive.writestr(name, text)
        for member in members:
            archive.writestr(*member)
        archive.comment = b"fastnorm checkpoint 1 sha256 " + bytes(64)
    return sealed(stream.getvalue())


def central(content, offset, field):
    """The file with a field of the last entry of its zip directory overwritten."""
    at = content.rindex(b"PK\x01\x02") + offset
    return sealed(content[:at] + field + content[at + len(field):])


HUGE = 1 << 40
HOSTILE = {
    "bomb": (forged(("0.npy", npy(np.zeros(1 << 22))), compression=zipfile.ZIP_DEFLATED), "its members are compressed"),
    "text bomb": (forged(text='{"a": "' + "x" * (1 << 26) + '"}', compression=zipfile.ZIP_DEFLATED),
                  "its members are compressed"),
    "long text": (forged(text='{"a": "' + "x" * (1 << 24) + '"}'), "state.json is larger than 16777216 bytes"),
    "deep text": (forged(text="[" * 100_000), "decoding a JSON"),
    "deep dicts": (forged(text='{"a":' * 100_000), "decoding a JSON"),
    "no JSON": (forged(text='{"a": '), "Expecting value"),
    "a list": (forged(text="[1]"), "state.json holds no names"),
    "digits": (forged(text='{"a": ' + "9" * 10_000 + "}"), "digits"),
    "huge shape": (forged(("0.npy", header((HUGE,)) + bytes(8))), f"0.npy has 8 bytes for shape ({HUGE},)"),
    "huge empty shape": (forged(("0.npy", header((0, 1 << 70)))), ""),
    "negative shape": (forged(("0.npy", header((-1, -1)) + bytes(8))), "0.npy has 8 bytes for shape (-1, -1)"),
    "many axes": (forged(("0.npy", header((1,) * 500) + bytes(8))), ""),
    "long header": (forged(("0.npy", header((1,) * 5000) + bytes(8))), ""),
    "too much": (forged(("0.npy", npy(np.ones(3)) + bytes(1))), "0.npy has 25 bytes for shape (3,)"),
    "too little": (forged(("0.npy", npy(np.ones(3))[:-1])), "0.npy has 23 bytes for shape (3,)"),
    "pickle": (forged(("0.npy", npy(np.array([Pickled()], object)))), "0.npy holds pickled objects"),
    "pickle in fields": (forged(("0.npy", header((1,), [("a", "|O")]) + bytes(8))), "0.npy holds pickled objects"),
    "fields": (forged(("0.npy", npy(np.zeros(2, "i4,f8")))), "0.npy holds dtype"),
    "text array": (forged(("0.npy", npy(np.array(["a"])))), "0.npy holds dtype <U1"),
    "other npy": (forged(("0.npy", npy(np.ones(3), (2, 0)))), "0.npy is of another version of the .npy format"),
    "no npy": (forged(("0.npy", b"weights")), ""),
    "path": (forged(("../0.npy", npy(1.0))), "its members are not those of one"),
    "absolute path": (forged(("/tmp/0.npy", npy(1.0))), "its members are not those of one"),
    "path of the text": (forged(("0.npy", npy(1.0)), name="../state.json"), "its members are not those of one"),
    "a gap": (forged(("1.npy", npy(1.0))), "its members are not those of one"),
    "twice the name": (forged(("0.npy", npy(1.0)), ("0.npy", npy(2.0))), "its members are not those of one"),
    "no array": (forged(), "it has no array 0, or refers to it twice"),
    "array twice": (forged(("0.npy", npy(1.0)), text='{"a": {"__array__": 0}, "b": {"__array__": 0}}'),
                    "it has no array 0, or refers to it twice"),
    "array of no number": (forged(("0.npy", npy(1.0)), text='{"a": {"__array__": [0]}}'), "unhashable"),
    "array too many": (forged(("0.npy", npy(1.0)), text="{}"), "it holds arrays that nothing refers to"),
    "claims to be large": (central(forged(("0.npy", npy(1.0))), 20, b"\xff\xff\xff\x7f" * 2), "its members overlap"),
    "before the begin": (central(forged(("0.npy", npy(1.0))), 42, b"\xff" * 4), ""),
    "encrypted": (central(forged(("0.npy", npy(1.0))), 8, b"\x01"), "encrypted"),
    "empty zip": (sealed(b"PK\5\6" + bytes(16) + b"\x5d\0fastnorm checkpoint 1 sha256 " + bytes(64)),
                  "its members are not those of one"),
    "next version": (forged(("0.npy", npy(1.0))).replace(b"checkpoint 1 ", b"checkpoint 2 "),
                     "expected version 1 of the format, got 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_little_cost(file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, reason = HOSTILE[name]
    file.write_bytes(content)
    tracemalloc.start()
    try:
        message = refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.startswith(DAMAGED)
    assert reason in message
    # a chunk to hash, the text and what JSON makes of it; and never what the file claims to be
    assert peak < (1 << 22) + 4 * len(content)
    assert os.listdir(tmp_path) == ["run.npz"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("epoch 1\n")
    (tmp_path / "empty").touch()
    np.savez(tmp_path / "other.npz", weight=np.ones(3))
    np.save(tmp_path / "array.npy", np.ones(3))
    for name in ("text", "empty", "other.npz", "array.npy"):
        assert refusal(tmp_path / name) == DAMAGED + "it does not end as one)"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "expected a file, got a device, pipe or socket"
    for name, error in ((".", IsADirectoryError), ("absent", FileNotFoundError)):
        with pytest.raises(error):
            checkpoint.load(tmp_path / name)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["numpy.lib.format.write_array", "os.fsync", "os.replace"])
def test_a_save_that_fails_keeps_the_old_file(file, monkeypatch, where, failure):
    checkpoint.save(file, epoch=1)

    def fail(*arguments, **options):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(where, fail)
        with pytest.raises(type(failure)):
            checkpoint.save(file, epoch=2, a=np.ones(3))
    assert checkpoint.load(file) == {"epoch": 1}
    assert os.listdir(file.parent) == ["run.npz"]


def test_file_then_name_then_folder_reach_the_disk(file, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(*names):
        done.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.save(file, epoch=1)
    assert done == ["file", "rename", "folder"]


def test_save_follows_a_symbolic_link_and_the_umask(tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    checkpoint.save(tmp_path / "link.npz", epoch=1)
    assert (tmp_path / "link.npz").is_symlink()
    (tmp_path / "other").touch()
    assert (tmp_path / "real.npz").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_permissions_are_kept(file):
    checkpoint.save(file, epoch=1)
    file.chmod(0o600)
    checkpoint.save(file, epoch=2)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_save_within_a_save_leaves_both_whole(file, monkeypatch):
    """A handler of SIGTERM saves while the thread that it interrupts does; then the process ends, or goes on."""
    fsync, found = os.fsync, []

    def interrupted(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        checkpoint.save(file, epoch=3, a=np.zeros(5))
        found.append(checkpoint.load(file)["epoch"])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    checkpoint.save(file, epoch=2, a=np.ones(5000))
    assert found == [3]
    assert checkpoint.load(file)["epoch"] == 2
    assert os.listdir(file.parent) == ["run.npz"]


def test_what_a_killed_save_left_is_removed_and_what_another_writes_is_not(file):
    fcntl = pytest.importorskip("fcntl")
    abandoned, busy, other, victim = (
        file.with_name(name) for name in (".run.npz.0123456789abcdef.tmp", ".run.npz.fedcba9876543210.tmp",
                                          ".run.npz.backup.tmp", "victim"))
    for path in (abandoned, busy, other, victim):
        path.write_bytes(b"bytes")
    link = file.with_name(".run.npz.00000000000000ff.tmp")
    link.symlink_to(victim)
    with open(busy, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        checkpoint.save(file, epoch=1)
    assert {path.name for path in file.parent.iterdir()} == {path.name for path in (file, busy, other, victim, link)}
    assert victim.read_bytes() == b"bytes"
    checkpoint.save(file, epoch=2)
    assert not busy.exists()


def test_a_file_taken_for_an_abandoned_one_is_made_again(file, monkeypatch):
    """By another call of save, before it could be locked."""
    lock, removed = checkpoint._lock, []

    def too_late(descriptor, wait):
        """Another call has taken the lock, and removes the name some time later."""
        if not removed:
            removed.extend(file.parent.glob(".run.npz.*.tmp"))
            other = open(removed[0], "rb")  # noqa: SIM115  # closed by the timer
            assert lock(other.fileno(), wait=False)
            threading.Timer(0.1, lambda: (removed[0].unlink(), other.close())).start()
        return lock(descriptor, wait)

    monkeypatch.setattr(checkpoint, "_lock", too_late)
    checkpoint.save(file, epoch=1)
    assert len(removed) == 1
    assert os.listdir(file.parent) == ["run.npz"]
    assert checkpoint.load(file) == {"epoch": 1}


def test_destinations_that_are_odd(file, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file, got a device, pipe or socket"):
        checkpoint.save(tmp_path / "pipe", epoch=1)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(IsADirectoryError):
        checkpoint.save(tmp_path, epoch=1)
    long = tmp_path / ("ä" * 120 + ".npz")  # 244 of the 255 bytes that a name may have
    checkpoint.save(long, epoch=1)
    assert checkpoint.load(long) == {"epoch": 1}
    os_open = os.open

    def unreadable(path, *rest, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return os_open(path, *rest, **options)

    monkeypatch.setattr(os, "open", unreadable)
    checkpoint.save(file, epoch=1)  # all but the flush of its folder
    assert checkpoint.load(file) == {"epoch": 1}


def test_states_within_themselves_are_refused(file):
    endless = []
    endless.append(endless)
    deep = 0
    for _ in range(100_000):
        deep = [deep]
    for state in (endless, deep):
        with pytest.raises(ValueError, match="states: expected dicts and lists that end"):
            checkpoint.save(file, state=state)
    assert not file.exists()


def test_threads_that_save_to_one_name_do_not_mix(file):
    def save(k):
        for _ in range(20):
            checkpoint.save(file, a=np.full(5000, k), k=k)

    save(0)
    threads = [threading.Thread(target=save, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        state = checkpoint.load(file)
        assert np.all(state["a"] == state["k"])
    assert os.listdir(file.parent) == ["run.npz"]


# -- killed at any moment ----------------------------------------------------------------------------------------------


def train_until_killed(path):
    """In a child: go on from the file and save after every step, telling the parent of the step that the file holds."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        return child, read_end
    training = Training()
    training.restore(path)
    os.write(write_end, b"%d " % training.steps)
    while True:
        training.advance()
        training.save(path)
        os.write(write_end, b"%d " % training.steps)


def kill_again_and_again(path, kills):
    """Kill one training after the other at random moments; each goes on from what the one before left behind."""
    Training().save(path)
    started = time.perf_counter()
    Training().save(path)
    a_save_and_more = 1.5 * (time.perf_counter() - started)
    rng = random.Random(7)
    steps = in_write = unreported = 0
    for _ in range(kills):
        child, reports = train_until_killed(path)
        with open(reports, "rb", buffering=0) as pipe:
            told = pipe.read(100)  # waits until it goes on
            time.sleep(rng.uniform(0, a_save_and_more))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told = int((told + pipe.read()).split()[-1])
        found = checkpoint.load(path)["steps"]  # whole, or this raises
        assert found in (told, told + 1), f"after step {told}, the file holds step {found}"
        steps, unreported = found, unreported + (found > told)
        for unfinished in path.parent.glob(".run.npz.*.tmp"):
            unfinished.unlink()
            in_write += 1
    whole = Training()
    whole.advance(steps)
    whole.save(path.with_name("whole.npz"))
    assert path.read_bytes() == path.with_name("whole.npz").read_bytes()
    print(f"{kills} kills, {in_write} of them during a write, {unreported} after the rename: the file was whole "
          f"each time, and after {steps} steps the same bits as without")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(file):
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, str(file)], capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    in_write, steps = map(int, re.search(r"(\d+) of them .* (\d+) steps", done.stdout).groups())
    assert in_write > 0
    assert steps > 0


if __name__ == "__main__":
    kill_again_and_again(Path(sys.argv[1]), KILLS)
