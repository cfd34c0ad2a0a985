"""The command line as a user meets it: `python -m fastnorm info` and `train`, and every mistake one can make."""

import importlib.util
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_demo_data import write_set

from fastnorm import _runtime
from fastnorm.__main__ import main
from fastnorm._demo import checkpoint

EXTRA = ("sklearn", "rich", "matplotlib", "threadpoolctl")
MISSING = [name for name in EXTRA if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"needs the demo extra: {', '.join(MISSING)} not installed")

# Runs the command line in an interpreter in which some modules cannot be imported.
WITHOUT = """
import runpy, sys
blocked = set(sys.argv.pop(1).split(","))
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
runpy.run_module("fastnorm", run_name="__main__", alter_sys=True)
"""


def environment(**changes):
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "FASTNORM_"))}
    return keep | changes


def run(*arguments, **changes):
    """Run `python -m fastnorm` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "fastnorm", *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=environment(**changes), check=False)


def run_without(modules, *arguments):
    return subprocess.run([sys.executable, "-c", WITHOUT, ",".join(modules), *map(str, arguments)],
                          capture_output=True, text=True, timeout=120, env=environment(), check=False)


def train(*arguments):
    """`train` in this process, which has imported everything already; it must succeed."""
    assert main(["train", *map(str, arguments)]) == 0


def assert_one_line(error, *parts):
    """One line that names the program and says what is wrong."""
    assert error.startswith("fastnorm: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def accuracies(text):
    """Test accuracies, in percent, of the final table."""
    return [float(x) for x in re.findall(r"([\d.]+)%", re.search(r"^ test accuracy(.*)$", text, re.M)[1])]


# -- info --------------------------------------------------------------------------------------------------------------


def test_info():
    done = run("info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == len(_runtime.config())  # into a pipe, one line an entry
    width = max(map(len, _runtime.config())) + 2
    for line, title in zip(lines, _runtime.config(), strict=True):
        assert line.startswith(title.ljust(width))
        assert line[width] != " "


def test_info_needs_no_extra():
    done = run_without(EXTRA, "info")
    assert (done.returncode, done.stderr) == (0, "")


def test_import_needs_no_extra():
    code = f"import sys, fastnorm; print(sorted(set({EXTRA!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_kernels_that_cannot_load():
    done = run("info", FASTNORM_ISA="mmx")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "FASTNORM_ISA", "'mmx'")
    done = subprocess.run([sys.executable, "-c", "import fastnorm"], capture_output=True, text=True, check=False,
                          env=environment(FASTNORM_ISA="mmx"))
    assert "ImportError: FASTNORM_ISA" in done.stderr  # a program gets the exception


# -- the main job ------------------------------------------------------------------------------------------------------


@needs_extra
def test_main_job():
    """`python -m fastnorm train` with nothing else, its output into a pipe."""
    done = run("train")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert min(accuracies(done.stdout)) >= 97
    for backend in ("fastnorm", "reference"):
        assert len(re.findall(rf"^{backend} +epoch +\d+/20  loss [\d.]+  accuracy", done.stdout, re.M)) == 20
    for title in ("time per epoch", "speed-up", "Largest difference between the loss curves"):
        assert title in done.stdout


@needs_extra
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw", "adagrad"])
def test_each_optimizer_learns_the_digits(capsys, optimizer):
    train("--optimizer", optimizer, "--backend", "fastnorm")
    assert min(accuracies(capsys.readouterr().out)) >= 97


@needs_extra
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "celu", "sigmoid", "tanh"])
def test_each_activation_learns_on_both_backends(capsys, activation):
    """Three epochs; the backends round differently, and far less than one image in 360 apart this early."""
    train("--activation", activation, "--epochs", 3)
    out = capsys.readouterr().out
    fast, reference = accuracies(out)
    assert min(fast, reference) > 93
    assert abs(fast - reference) < 0.6
    differences = re.findall(r"^ (?:training|test) loss +(\S+e\S+)", out, re.M)
    assert len(differences) == 2
    assert max(map(float, differences)) < 1e-3


@needs_extra
@pytest.mark.parametrize("init", ["lecun_normal", "lecun_uniform", "xavier_normal", "xavier_uniform", "he_normal",
                                  "he_uniform"])
def test_each_init(capsys, init):
    train("--init", init, "--epochs", 2, "--backend", "fastnorm")
    out = capsys.readouterr().out
    assert init in out
    assert min(accuracies(out)) > 93


@needs_extra
def test_augmented_training(capsys):
    train("--augment", "--epochs", 12, "--backend", "fastnorm")
    assert min(accuracies(capsys.readouterr().out)) > 95


@needs_extra
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_idx_files_without_scikit_learn(tmp_path, rng, compress):
    write_set(tmp_path, rng, n=400, n_test=101, compress=compress)
    done = run_without(["sklearn"], "train", "--data", tmp_path, "--epochs", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "400 training and 101 test images of 6 x 6, 3 classes" in done.stdout


@needs_extra
@pytest.mark.parametrize("n", [65, 66])
def test_a_last_batch_of_one_row(tmp_path, rng, capsys, n):
    write_set(tmp_path, rng, n=n)
    train("--data", tmp_path, "--epochs", 1)
    assert f"{n} training" in capsys.readouterr().out


@needs_extra
@pytest.mark.parametrize(("columns", "status"), [
    ("100", r"4/4  loss [\d.]+  accuracy +[\d.]+%  test +[\d.]+%"), ("60", r"4/4  accuracy +[\d.]+%  test +[\d.]+%"),
    ("40", "4/4")])
def test_progress_bar_on_a_terminal(columns, status):
    """A pseudo-terminal: the bar is drawn, in a narrow window too, and the cursor is there again afterwards."""
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "fastnorm", "train", "--epochs", "4"], stdout=follower,
                          stderr=follower, env=environment(TERM="xterm-256color", COLUMNS=columns)) as process:
        os.close(follower)
        chunks = []
        while select.select([leader], [], [], 60)[0]:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.wait(60) == 0
    os.close(leader)
    text = b"".join(chunks).decode()
    assert re.search(rf"fastnorm[^\n]*━[^\n]*{status}[^\n]*\d:\d\d:\d\d", text)
    assert "…" not in text  # no number is cut off
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # show the cursor, after the last hide
    assert "test accuracy" in text


# -- the same bits -----------------------------------------------------------------------------------------------------


@needs_extra
def test_same_bits_at_any_thread_count(tmp_path, rng):
    """Checkpoints hold history, parameters and all state; they are compared byte by byte.

    The batches and the network are large enough for every kernel to use the threads.
    """
    write_set(tmp_path, rng, n=2000, n_test=500, side=28, classes=10)
    options = ["--data", tmp_path, "--epochs", "2", "--batch-size", "1000", "--dropout", "0.2", "--augment",
               "--activation", "elu", "--backend", "fastnorm"]
    saved = []
    for i, (threads, omp) in enumerate([("1", "2"), ("2", "1"), ("3", "2"), (None, "3"), (None, "1")]):
        file = tmp_path / f"{i}.npz"
        given = [] if threads is None else ["--threads", threads]
        done = run("train", *options, *given, "--save", file, OMP_NUM_THREADS=omp, OPENBLAS_NUM_THREADS=omp)
        assert done.returncode == 0, done.stderr
        assert f"threads: {threads or omp}" in done.stdout or not _runtime._facts.openmp_version()
        saved.append(file.read_bytes())
    assert all(content == saved[0] for content in saved)


@needs_extra
def test_another_seed_gives_other_bits(tmp_path):
    for seed in (1, 2):
        train("--epochs", 1, "--seed", seed, "--backend", "fastnorm", "--save", tmp_path / f"{seed}.npz")
    one, two = (checkpoint.load(tmp_path / f"{seed}.npz")["network"] for seed in (1, 2))
    assert not np.array_equal(one["0.weight"], two["0.weight"])


@needs_extra
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw", "adagrad"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, optimizer):
    options = ["--optimizer", optimizer, "--dropout", 0.3, "--augment", "--seed", 7, "--lr", 0.004]
    whole, half, resumed = (tmp_path / f"{name}.npz" for name in ("whole", "half", "resumed"))
    train(*options, "--epochs", 4, "--save", whole, "--backend", "fastnorm")
    train(*options, "--epochs", 2, "--save", half, "--backend", "fastnorm")
    # all other settings are in the file
    train("--load", half, "--epochs", 4, "--save", resumed, "--backend", "fastnorm")
    assert resumed.read_bytes() == whole.read_bytes()


@needs_extra
def test_the_reference_can_continue_a_checkpoint(tmp_path, capsys):
    file = tmp_path / "run.npz"
    train("--epochs", 3, "--save", file, "--backend", "fastnorm")
    capsys.readouterr()
    train("--epochs", 4, "--load", file)
    out = capsys.readouterr().out
    assert "resumed   after epoch 3" in out
    assert len(re.findall(r"^(?:fastnorm|reference) +epoch 4/4", out, re.M)) == 2


@needs_extra
def test_a_finished_checkpoint_is_evaluated(tmp_path, capsys):
    file, again = tmp_path / "run.npz", tmp_path / "again.npz"
    train("--epochs", 3, "--save", file, "--backend", "fastnorm")
    before = accuracies(capsys.readouterr().out)
    train("--load", file, "--backend", "fastnorm", "--save", again)
    assert accuracies(capsys.readouterr().out) == before
    assert again.read_bytes() == file.read_bytes()


@needs_extra
def test_interrupt(tmp_path):
    """Ctrl-C: status 130, one line, and the checkpoint of the last epoch is whole."""
    file = tmp_path / "run.npz"
    with subprocess.Popen([sys.executable, "-m", "fastnorm", "train", "--epochs", "100000", "--save", str(file)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        for line in process.stdout:
            if "epoch      3/" in line:
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert_one_line(error, "interrupted", f"{file} holds it")
    assert os.listdir(tmp_path) == ["run.npz"]
    done = len(checkpoint.load(file)["history"]["train_loss"])
    assert done >= 3
    train("--load", file, "--epochs", done + 1, "--backend", "fastnorm")


@needs_extra
def test_a_reader_that_leaves():
    """`python -m fastnorm train | head -1`."""
    process = subprocess.Popen([sys.executable, "-m", "fastnorm", "train"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment())
    with process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@needs_extra
@pytest.mark.parametrize("arguments", [["info"], ["train", "--epochs", "1"]], ids=" ".join)
def test_an_output_that_cannot_be_written(arguments):
    """`... > /dev/full`, a full disk, is one line; `... >&-`, none at all, is no reason to stop."""
    command = [sys.executable, "-m", "fastnorm", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert_one_line(done.stderr, "No space left on device")
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False,
                          env=environment())
    assert (done.returncode, done.stderr) == (0, "")


@needs_extra
def test_names_that_the_terminal_cannot_show(tmp_path, rng):
    """An undecodable file name, letters that an ASCII terminal lacks, a line break: written as escapes."""
    data, file = tmp_path / "donn\N{LATIN SMALL LETTER E WITH ACUTE}es", tmp_path / os.fsdecode(b"\xff.npz")
    data.mkdir()
    write_set(data, rng)
    done = run("train", "--data", data, "--epochs", 1, "--save", file, PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert "donn\\xe9es: " in done.stdout
    assert "\\udcff.npz" in done.stdout
    assert file.exists()
    done = run("train", "--data", tmp_path / "two\nlines")
    assert done.returncode == 2
    assert_one_line(done.stderr, "two\\nlines: no such directory")


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Pickled:
    """Leaves a trace if it is ever unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path("unpickled").absolute()),)


def _damaged(folder):
    """Files that are no checkpoints, by name."""
    checkpoint.save(folder / "good.npz", {"epoch": np.arange(1000.0)})
    good = (folder / "good.npz").read_bytes()
    (folder / "truncated").write_bytes(good[:len(good) // 2])
    (folder / "flipped").write_bytes(good.replace(bytes(np.float64(77)), bytes(np.float64(78))))
    (folder / "empty").touch()
    (folder / "text").write_text("epoch 1\n")
    np.savez(folder / "other.npz", weight=np.ones(3))
    np.save(folder / "array.npy", np.ones(3))
    np.savez(folder / "objects.npz", state=np.array([Pickled()], object))
    np.savez(folder / "version.npz", state=np.array('{"format": "fastnorm checkpoint 0"}'))
    np.savez(folder / "json.npz", state=np.array('{"format": '))
    return ["truncated", "flipped", "empty", "text", "other.npz", "array.npy", "objects.npz", "version.npz", "json.npz"]


def test_damaged_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in _damaged(tmp_path):
        with pytest.raises(checkpoint.UserError) as error:
            checkpoint.load(tmp_path / name)
        assert f"{name}: not a fastnorm checkpoint, or a damaged one" in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


# -- mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = [
    ([], "COMMAND"),
    (["predict"], "'predict'"),
    (["info", "x"], "unknown option or argument: x"),
    (["train", "--foo"], "unknown option or argument: --foo"),
    (["train", "--epoch", "3"], "unknown option or argument: --epoch"),  # no abbreviations
    (["train", "--optimizer", "adamax"], "--optimizer: invalid choice: 'adamax'"),
    (["train", "--activation", "gelu"], "--activation: invalid choice"),
    (["train", "--init", "zeros"], "--init: invalid choice"),
    (["train", "--backend", "torch"], "--backend: invalid choice"),
    (["train", "--epochs"], "--epochs: expected one argument"),
    (["train", "--epochs", "0"], "--epochs: expected an integer >= 1, got '0'"),
    (["train", "--epochs", "2.5"], "--epochs: expected an integer >= 1, got '2.5'"),
    (["train", "--batch-size", "1"], "--batch-size: expected an integer >= 2, got '1'"),
    (["train", "--threads", "0"], "--threads: expected an integer in [1, 1024], got '0'"),
    (["train", "--threads", "4096"], "--threads: expected an integer in [1, 1024]"),
    (["train", "--seed", "-1"], "--seed: expected an integer >= 0, got '-1'"),
    (["train", "--search", "0"], "--search: expected an integer >= 1, got '0'"),
    (["train", "--lr", "0"], "--lr: expected a number in (0, inf), got '0'"),
    (["train", "--lr", "nan"], "--lr: expected a number in (0, inf), got 'nan'"),
    (["train", "--lr", "inf"], "--lr: expected a number in (0, inf), got 'inf'"),
    (["train", "--lr", "fast"], "--lr: expected a number in (0, inf), got 'fast'"),
    (["train", "--dropout", "1"], "--dropout: expected a number in [0, 1), got '1'"),
    (["train", "--dropout", "-0.1"], "--dropout: expected a number in [0, 1), got '-0.1'"),
    (["train", "--beta", "1"], "--beta: expected a number in [0, 1), got '1'"),
]
MISTAKES_OF_TRAINING = [
    (["--data", "absent"], "absent: no such directory"),
    (["--data", "run.npz"], "run.npz: not a directory"),
    (["--data", "."], "expected train-images-idx3-ubyte or train-images-idx3-ubyte.gz there, found neither"),
    (["--load", "absent.npz"], "--load: absent.npz: No such file or directory"),
    (["--load", "."], "--load: .: Is a directory"),
    (["--load", "text"], "--load: text: not a fastnorm checkpoint"),
    (["--load", "run.npz", "--data", "idx"], "run.npz: was trained on 64 inputs in 10 classes, got 36 inputs in 3"),
    (["--load", "run.npz", "--optimizer", "sgd"],
     "was trained with --optimizer adam, cannot go on with --optimizer sgd"),
    (["--load", "run.npz", "--seed", "3"], "was trained with --seed 0, cannot go on with --seed 3"),
    (["--load", "run.npz", "--augment"], "was trained without --augment, cannot go on with --augment"),
    (["--load", "shape.npz"], "network.2.weight: expected float32 (256, 256), got float32 (256, 255)"),
    (["--load", "optimizer.npz"], "--load: optimizer.npz: "),
    (["--load", "settings.npz"], "--load: settings.npz: not a fastnorm checkpoint"),
    (["--load", "kind.npz"], "epochs: expected int, got 'many'"),
    (["--load", "history.npz"], "history"),
    (["--load", "rng.npz"], "rng.npz: a damaged checkpoint"),
    (["--load", "data.npz"], "was trained on other data"),
    (["--save", "absent/run.npz"], "--save: absent: no such directory"),
    (["--save", "."], "expected a file name, got a directory"),
    (["--save", "pipe"], "--save: pipe: expected a file name, got a device, pipe or socket"),
    (["--save", "loop"], "--save: loop: "),
    (["--save", "dangling"], "absent: no such directory"),
    (["--save", "x" * 300], ": File name too long"),
    (["--plot", "x" * 300 + ".png"], ": File name too long"),
    (["--plot", "absent/figure.png"], "--plot: absent: no such directory"),
    (["--plot", "figure.docx"], "--plot: figure.docx: expected a file name that ends in one of"),
    (["--plot", "figure"], "--plot: figure: expected a file name that ends in one of"),
    (["--optimizer", "adagrad", "--beta", "0.9"], "--beta: adagrad has no such parameter"),
    (["--search", "2", "--save", "x.npz"], "--search: cannot be combined with --save"),
    (["--search", "2", "--lr", "0.1"], "--search: cannot be combined with --lr"),
    (["--lr", "1e30"], "the training loss became nan in epoch 1: try a smaller --lr (it is 1e+30)"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value) if value else "none")
def test_mistake(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files that a training could be told to use: a checkpoint, damaged ones, a set of IDX files."""
    folder = tmp_path_factory.mktemp("mistakes")
    train("--epochs", 1, "--backend", "fastnorm", "--save", folder / "run.npz")
    state = checkpoint.load(folder / "run.npz")

    def spoil(name, **changes):
        checkpoint.save(folder / f"{name}.npz", state | changes)

    spoil("shape", network=state["network"] | {"2.weight": np.zeros((256, 255), np.float32)})
    spoil("optimizer", optimizer={})
    spoil("settings", settings=state["settings"] | {"optimizer": "lion"})
    spoil("kind", settings=state["settings"] | {"epochs": "many"})
    spoil("history", history=state["history"] | {"test_accuracy": []})
    spoil("rng", order_rng={"bit_generator": "MT19937"})
    spoil("data", data={"name": "digits", "fingerprint": 1})
    (folder / "text").write_text("epoch 1\n")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("absent/run.npz")
    (folder / "idx").mkdir()
    write_set(folder / "idx", np.random.default_rng(0))
    return folder


@needs_extra
@pytest.mark.parametrize(("arguments", "message"), MISTAKES_OF_TRAINING, ids=lambda value: " ".join(value))
def test_mistake_of_training(capsys, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    assert main(["train", *arguments]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert sorted(os.listdir()) == before


@needs_extra
def test_mistakes_in_a_process_of_their_own(tmp_path):
    for arguments in (["train", "--foo"], ["train", "--data", tmp_path], ["train", "--load", tmp_path / "absent"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert_one_line(done.stderr)


@pytest.mark.parametrize(("module", "package"), [("rich", "rich"), ("threadpoolctl", "threadpoolctl"),
                                                 ("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_extra(module, package, tmp_path):
    done = run_without([module], "train", "--plot", tmp_path / "figure.png")
    assert (done.returncode, done.stdout) == (2, "")
    if package not in done.stderr and MISSING:
        pytest.skip(f"another one is missing first: {', '.join(MISSING)}")
    assert_one_line(done.stderr, f"{package} is not installed", "pip install", "fastnorm[demo]")


# -- figure and search -------------------------------------------------------------------------------------------------


@needs_extra
@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_plot(tmp_path, capsys, suffix, start):
    file = tmp_path / f"figure.{suffix}"
    train("--epochs", 2, "--plot", file)
    assert file.read_bytes().startswith(start)
    if suffix == "svg":
        text = file.read_text()
        for label in ("training, fastnorm", "test, fastnorm", "training, reference", "test, reference"):
            assert label in text


@needs_extra
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_search(capsys, optimizer):
    train("--search", 4, "--epochs", 2, "--optimizer", optimizer, "--batch-size", 128)
    out = capsys.readouterr().out
    table = out[out.index("Settings tried"):]
    rows = [line.split() for line in table.splitlines() if re.match(r" \d", line)]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert sorted(row[-1] for row in rows) == ["finer"] * 2 + ["first"] * 4
    scores = [float(row[-3].rstrip("%")) for row in rows]
    assert scores == sorted(scores, reverse=True)
    command = table.splitlines()[-1]
    assert command.startswith("Train with the best: python -m fastnorm train ")
    assert f"--lr {rows[0][1]}" in command
    assert ("--beta" in command) == (optimizer == "adam")
    assert "--batch-size 128" in command
    assert "--epochs" not in command
    train("--search", 4, "--epochs", 2, "--optimizer", optimizer, "--batch-size", 128)
    assert capsys.readouterr().out == out  # the same seed, the same search


@needs_extra
def test_search_does_not_look_at_the_test_set(monkeypatch, capsys):
    """The same ranking where the test images are noise."""
    import dataclasses

    from fastnorm._demo import command, data

    digits = data.load_digits()
    noise = data.Split(np.random.default_rng(0).random(digits.test.images.shape, np.float32), digits.test.labels)
    output = []
    for test in (digits.test, noise):
        monkeypatch.setattr(command, "load_digits", lambda test=test: dataclasses.replace(digits, test=test))
        train("--search", 2, "--epochs", 1)
        output.append(capsys.readouterr().out)
    assert output[0] == output[1]
