"""The benchmark: bytes of each case, interleaved measurement, results as JSON, the report, the command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_demo_cli import assert_one_line, run_without

import fastnorm as fn
from fastnorm import _runtime, reference
from fastnorm.__main__ import main
from fastnorm._bench import cases, figures, measure, results, rivals
from fastnorm._bench import run as running
from fastnorm._bench.cases import BatchNorm, CrossEntropy, Elementwise, Softmax, Traffic, Update

MISSING = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"needs the bench extra: {', '.join(MISSING)} not installed")
SCRIPTS = Path(__file__).parents[1] / "bench"
needs_scripts = pytest.mark.skipif(not SCRIPTS.exists(), reason="tests run outside a checkout")

SMALL_NORM = [BatchNorm(dtype, what, shape, layout, activation, residual)
              for dtype in ("float32", "float64")
              for shape, layout in (((4, 6, 5, 3), "NCHW"), ((4, 5, 3, 6), "NHWC"), ((20, 6), "MC"))
              for what in ("forward", "backward", "both", "inference")
              for activation, residual in ((None, False), ("relu", False), ("relu", True))]
SMALL = [*SMALL_NORM, Softmax("float32", (7, 5)), CrossEntropy("float32", (7, 5)),
         CrossEntropy("float64", (2, 5, 4, 3), 1),
         *(Update("float32", rule, "two", ((10, 3), (7,))) for rule in cases.STATES),
         *(Update("float64", rule, "100", ((100,),)) for rule in cases.STATES),
         *(Elementwise("float32", function, what, 50) for function in cases.ACTIVATIONS
           for what in ("forward", "backward"))]


# -- cases -------------------------------------------------------------------------------------------------------------

X = 2 * 3 * 4 * 4 * 4  # bytes of a float32 array of shape (2, 3, 4, 4)
SHAPE = (2, 3, 4, 4)


@pytest.mark.parametrize(("case", "traffic"), [
    (BatchNorm("float32", "forward", SHAPE, "NCHW"), (0, X, 0)),
    (BatchNorm("float32", "inference", SHAPE, "NCHW", "relu"), (0, X, 0)),
    (BatchNorm("float32", "forward", SHAPE, "NCHW", "relu", True), (X, X, 0)),
    (BatchNorm("float32", "backward", SHAPE, "NHWC"), (X, X, 0)),
    (BatchNorm("float32", "backward", SHAPE, "NHWC", "relu", True), (X, 2 * X, 0)),
    (BatchNorm("float64", "both", SHAPE, "NCHW"), (2 * X, 4 * X, 0)),
    (BatchNorm("float32", "both", SHAPE, "NCHW", "relu", True), (2 * X, 3 * X, 0)),
    (Softmax("float32", (10, 20)), (0, 800, 0)),
    (CrossEntropy("float32", (10, 20)), (80, 800, 0)),
    (CrossEntropy("float32", (2, 5, 3, 3), 1), (8 * 18, 360, 0)),
    (Update("float32", "momentum", "x", ((10,), (5, 2))), (80, 0, 160)),
    (Update("float32", "rmsprop", "x", ((20,),)), (80, 0, 160)),
    (Update("float32", "adagrad", "x", ((20,),)), (80, 0, 160)),
    (Update("float64", "adam", "x", ((20,),)), (160, 0, 480)),
    (Elementwise("float32", "tanh", "forward", 10), (0, 40, 0)),
    (Elementwise("float32", "tanh", "backward", 10), (40, 40, 0)),
    (Elementwise("float32", "dropout", "backward", 10), (0, 40, 0)),
], ids=lambda value: value.name if isinstance(value, cases.Case) else "")
def test_bytes(case, traffic):
    assert case.traffic == traffic
    assert case.traffic.total == traffic[0] + 2 * traffic[1] + 2 * traffic[2]


def test_limit_of_traffic():
    limit = {"read": 1.0, "copy": 2.0, "update": 4.0}
    assert Traffic(read=3, copied=5, updated=6).seconds(limit) == 3 + 5 + 3


def test_grid():
    grid, sweep = cases.full(), cases.sweep()
    names = [case.name for case in grid]
    assert len(set(names)) == len(names)
    assert len(set(sweep)) == len(sweep)
    assert {case.name for case in cases.quick()} <= set(names) | {"sigmoid forward 1,000,000"}
    for wanted in ("batch norm forward NCHW (32,64,56,56)", "batch norm+residual+ReLU both NHWC (256,7,7,512)",
                   "cross-entropy + gradient (8,21,256,256) axis 1", "Adam GPT-2 small", "Adam 25,000,000 float64",
                   "dropout backward 25,000,000", "batch norm inference (64,256)"):
        assert wanted in names
    assert max(case.array_bytes for case in sweep) == 1 << 30
    assert min(case.array_bytes for case in sweep) == 1 << 10
    assert json.loads(json.dumps([case.facts() for case in grid]))
    assert [case.name for case in cases.matching(cases.quick(), "ADAM resnet")] == ["Adam ResNet-50"]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_both_backends_do_the_same(case):
    """What is timed is the same computation: results agree, with outputs of the call's own and with given ones."""
    found = []
    for backend in (fn, reference):
        for mode in case.calls(backend, case.inputs()):
            inputs = case.inputs()
            found.append(outputs(case.calls(backend, inputs)[mode](), inputs))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def outputs(result, inputs):
    """Arrays of a call's result; of an optimizer, the parameters."""
    if result is None:
        return inputs["params"]
    first = result[0] if isinstance(result, tuple) else result
    return [np.array(first)]


# -- bandwidth and measurement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 63, 65536, 65537, 200_003])
def test_bandwidth_loops(level, threads, n):
    kernel = _runtime.kernels.bandwidth
    x = (np.arange(n) % 7).astype(np.float32)
    assert kernel.read(x, threads) == x.sum(dtype=np.float64)  # small integers: exact
    for stream in (True, False):
        y = np.full(n, np.nan, np.float32)
        kernel.copy(x, y, stream, threads)
        np.testing.assert_array_equal(x, y)
    kernel.update(y, 2.0, 1.0, threads)
    np.testing.assert_array_equal(y, 2 * x + 1)


class SteadyLimit(measure.Limit):
    """A limit that takes no time and logs when it is sampled."""

    def __init__(self, log):
        super().__init__(1)
        self.log = log

    def sample(self):
        self.log.append("limit")
        for name, rates in self.rates.items():
            rates.append({"read": 1e9, "copy": 2e9, "update": 3e9}[name])

    def evict(self):
        self.log.append("evict")


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setattr(measure, "LIMIT_BYTES", 1 << 20)


def test_calls_take_turns(monkeypatch):
    for name in ("PAUSE", "WARM", "TURN"):
        monkeypatch.setattr(measure, name, 0.0)
    monkeypatch.setattr(measure, "ASLEEP", 0.0)
    log = []
    calls = [measure.Call(name, cases.FRESH, lambda name=name: log.append(name), cold=name == "a",
                          prepare=lambda name=name: log.append(f"prepare {name}")) for name in ("a", "b", "c")]
    timings = measure.measure(calls, 0.02, limit := SteadyLimit(log), cold_calls=2)
    order = [word for word in log if word in "abc"]
    assert order[:21] == ["a", "b", "c"] * 7
    assert (log[6], log[-1]) == ("limit", "limit")  # before the first turn, after the last
    assert log[-9:-1].count("evict") == 2
    assert all(timing.calls >= len(timing.turns) >= measure.MIN_TURNS for timing in timings)
    assert [[turn[0] for turn in timing.turns[:5]] for timing in timings] == [[0, 1, 2, 3, 4]] * 3
    assert limit.samples() == [{"read": 1e9, "copy": 2e9, "update": 3e9}] * log.count("limit")
    assert [timing.cold is not None for timing in timings] == [True, False, False]
    assert all(timing.low <= timing.median <= timing.high for timing in timings)
    assert limit.result() == {"read": 1e9, "copy": 2e9, "update": 3e9}
    assert limit.spread() == 0


def test_slow_call_does_not_starve_fast_ones():
    import time

    calls = [measure.Call("fast", cases.FRESH, lambda: None),
             measure.Call("slow", cases.FRESH, lambda: time.sleep(.03))]
    fast, slow = measure.measure(calls, 0.4, SteadyLimit([]))
    assert fast.calls > 1000
    assert 1 <= slow.calls <= 10
    assert slow.low >= 0.03


def test_far_slower_call_takes_one_turn_and_slower_ones_enough(monkeypatch):
    import time

    for name in ("PAUSE", "WARM", "TURN"):
        monkeypatch.setattr(measure, name, 0.0)
    calls = [measure.Call(str(ms), cases.FRESH, lambda ms=ms: time.sleep(ms / 1000)) for ms in (5, 20, 100)]
    assert [len(t.turns) for t in measure.measure(calls, 0.05, SteadyLimit([]))] == [measure.MIN_TURNS] * 2 + [1]
    # all of them would take longer than is allowed
    assert {len(t.turns) for t in measure.measure(calls[:2], 0.001, SteadyLimit([]))} == {1}


def test_reset_comes_before_each_call_and_is_not_timed():
    import time

    state = []
    call = measure.Call("x", cases.FRESH, lambda: state.append("run"), reset=lambda: (state.append("reset"),
                                                                                      time.sleep(.002)))
    (timing,) = measure.measure([call], 0.05, SteadyLimit([]))
    assert state[::2] == ["reset"] * (len(state) // 2)
    assert state[1::2] == ["run"] * (len(state) // 2)
    assert timing.low < 0.001


def test_measured_limit():
    limit = measure.Limit(2)
    limit.start()
    limit.sample()
    limit.sample()
    assert set(limit.result()) == {"read", "copy", "update"}
    assert min(limit.result().values()) > 0
    assert limit.spread() >= 0


def test_run_case_restores_threads_and_level():
    before = _runtime.kernels.level, fn.get_num_threads()
    plan = running.Plan(2, 0.02, cold_calls=1, other_levels=True, one_thread=True, memory=True)
    row = running.run_case(BatchNorm("float32", "forward", (4, 6, 5, 5), "NCHW"), plan, [], measure.Limit(2), "grid")
    assert (_runtime.kernels.level, fn.get_num_threads()) == before
    levels = {t["level"] for t in row["times"] if t["rival"] == "fastnorm"}
    assert levels == set(_runtime.available_levels())
    assert {t["threads"] for t in row["times"] if t["rival"] == "fastnorm"} == {1, 2}
    assert results.ratio(row, "twin") > 0
    assert results.share(row) > 0


def test_failing_rival_is_named_and_left_out():
    class Failing:
        name, version = "failing", "1"

        def calls(self, case, inputs):
            raise RuntimeError("no such\noperator")

    row = running.run_case(Softmax("float32", (4, 5)), running.Plan(1, 0.01), [Failing()], measure.Limit(1), "grid")
    assert row["skipped"] == {"failing": "RuntimeError: no such operator"}
    assert results.rivals([row]) == ["twin"]


# -- rivals ------------------------------------------------------------------------------------------------------------

# In a process of its own: JAX and PyTorch keep threads, which the tests that fork must not meet.
RIVAL = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[2])
import numpy as np
from fastnorm import reference
from fastnorm._bench import rivals
from test_bench import SMALL, outputs
present, absent = rivals.load([sys.argv[1]], 2)
if absent:
    print(json.dumps({"absent": absent[sys.argv[1]]}))
    sys.exit()
compared, wrong = 0, []
for case in SMALL:
    inputs = case.inputs()
    expected = outputs(next(iter(case.calls(reference, inputs).values()))(), inputs)[0]
    for at in range(len(list(present[0].calls(case, case.inputs())))):
        inputs = case.inputs()
        call = list(present[0].calls(case, inputs))[at]
        for step in (call.prepare, call.reset):
            if step:
                step()
        result = call.run()
        if result is None:
            result = inputs["params"]
        while isinstance(result, (tuple, list)):
            result = result[0]
        actual = np.asarray(result.detach() if hasattr(result, "detach") else result)
        if getattr(case, "function", "") == "dropout":
            continue  # its own random numbers
        if actual.shape != expected.shape:  # channels last, seen as NCHW
            actual = np.moveaxis(actual, 1, -1)
        compared += 1
        if actual.dtype != expected.dtype or not np.allclose(actual, expected, rtol=2e-4, atol=2e-5):
            wrong.append(f"{case.name} {call.variant} {call.mode}")
print(json.dumps({"compared": compared, "wrong": wrong}))
"""


@pytest.mark.parametrize("name", ["PyTorch", "JAX", "thinc"])
def test_rival_computes_the_same(name):
    done = subprocess.run([sys.executable, "-c", RIVAL, name, str(Path(__file__).parent)], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    if "absent" in answer:
        pytest.skip(answer["absent"])
    assert answer["wrong"] == []
    assert answer["compared"] >= (1 if name == "thinc" else len(SMALL) - 2)


def test_absent_rival_has_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "thinc", None)
    monkeypatch.setitem(sys.modules, "thinc.api", None)
    present, absent = rivals.load(["thinc"], 1)
    assert present == []
    assert "thinc" in absent["thinc"]


# -- results and report ------------------------------------------------------------------------------------------------


def recorded(factor=1.0):
    """Results of a full run in which we take the limit's time over 0.9, and rivals ``factor`` times a constant."""
    rate = {"read": 1e11, "copy": 1e11, "update": 1e11}
    level = _runtime.available_levels()[-1]

    def time(rival, mode, low, threads=2, **rest):
        return {"rival": rival, "variant": "", "mode": mode, "threads": threads, "level": "", "low": low, "median": low,
                "high": low, "calls": 9, "cold": 2 * low, "page_faults": 0.0, "turns": [[0, 0, low]]} | rest

    def row(case, section, threads):
        own = case.traffic.seconds(rate) / 0.9
        modes = ["in place"] if isinstance(case, Update) else ["fresh", "out"]
        times = [time("fastnorm", mode, own, threads, level=level, peak_memory=4096) for mode in modes]
        times.append(time("fastnorm", modes[-1], 1.9 * own, 1, level=level))
        if threads == 1:
            times.pop()
        variant = {"variant": "fused step()"} if isinstance(case, Update) and case.rule != "rmsprop" else {}
        times += [time("PyTorch", mode, 10 * factor * own, threads, **variant) for mode in modes]
        times += [time("JAX", modes[0], 3 * factor * own, threads), time("twin", modes[0], 40 * factor * own)]
        return {"case": case.facts(), "section": section, "threads": threads, "limit": rate, "limit_spread": 0.1,
                "limits": [rate], "skipped": {}, "times": times}

    rows = [row(case, "grid", 2) for case in cases.full()] + [row(case, "sweep", 2) for case in cases.sweep()]
    rows += [row(case, "grid", 1) for case in cases.quick()]
    pair = {"quiet": rows[0], "busy": rows[0]}
    machine = results.machine() | {"caches": {"L1d": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}}
    return {"machine": machine, "threads": 2, "level": level, "full": True, "rivals": {"PyTorch": "2.13.0"},
            "absent": {"DeepSpeed": "deepspeed is not installed"}, "started": 0.0, "busy": [pair], "rows": rows}


def test_json_round_trip(tmp_path):
    found = recorded()
    results.write(tmp_path / "run.json", found)
    again = results.read(tmp_path / "run.json")
    assert again.pop("format") == results.FORMAT
    assert again == json.loads(json.dumps(found))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "rows": []}', '{"format": 1}', "\x00"])
def test_damaged_results(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(results.DamagedError, match=r"run\.json: not"):
        results.read(tmp_path / "run.json")


def test_ratio_compares_like_with_like():
    def time(rival, mode, low, variant=""):
        return {"rival": rival, "mode": mode, "low": low, "level": "avx2" if rival == "fastnorm" else "",
                "threads": 2, "variant": variant, "cold": None, "turns": [(0, 0, low)]}

    row = {"threads": 2, "times": [time("fastnorm", "fresh", 2.0), time("fastnorm", "out", 1.0),
                                   time("PyTorch", "fresh", 8.0, "a"), time("PyTorch", "fresh", 6.0, "b"),
                                   time("PyTorch", "out", 5.0), time("JAX", "fresh", 4.0)]}
    assert results.ratio(row, "PyTorch") == 3.0  # the faster way, allocating as we do
    assert results.ratio(row, "PyTorch", "out") == 5.0
    assert results.ratio(row, "PyTorch", variant="a") == 4.0
    assert results.ratio(row, "JAX", "out") is None
    assert results.ratio(row, "PyTorch", key="cold") is None


def test_bus_that_changes_its_speed_changes_no_ratio():
    """Everything takes twice as long from the third round on, which one of the calls sits out."""
    def time(rival, seconds, rounds, threads=2):
        turns = [(r, 2 * int(r > 2), seconds * (2 if r > 2 else 1)) for r in rounds]
        return {"rival": rival, "mode": "in place", "low": min(s for _, _, s in turns), "variant": "",
                "threads": threads, "level": "avx2" if rival == "fastnorm" else "", "turns": turns}

    case = Update("float32", "adagrad", "x", ((25,),))  # 100 bytes are read, 200 read and written
    fast = {"read": 100.0, "copy": 1.0, "update": 200.0}
    slow = {name: rate / 2 for name, rate in fast.items()}
    row = {"case": case.facts(), "threads": 2, "limits": [fast, fast, slow, slow],
           "times": [time("fastnorm", 4.0, range(2, 5)), time("PyTorch", 6.0, range(3)), time("JAX", 8.0, range(5)),
                     time("fastnorm", 7.0, range(2, 5), threads=1)]}
    assert results.ratio(row, "PyTorch") == 1.5
    assert results.ratio(row, "JAX") == 2
    assert results.share(row) == 0.75
    assert results.gain(row) == 7 / 4


def test_figures_reached_and_missed():
    reached = figures.figures(recorded())
    assert {figure.number for figure in reached} == set(range(1, 10))
    assert [f"{f.number} {f.text}: {f.shown}" for f in reached if not f.reached] == []
    least = next(f for f in reached if f.number == 1)
    assert least.value == pytest.approx(3.0)
    slow = figures.figures(recorded(factor=0.1))
    assert {f.number for f in slow if f.reached is False} == {1, 2, 4}
    lost = figures.losses(figures.main_grid(recorded(factor=0.1)))
    assert {rival for _, _, rival, _ in lost} == {"JAX"}  # PyTorch is as fast as we are, and that is not a loss
    empty = figures.figures(recorded() | {"rows": [], "busy": []})
    assert all(f.reached is None and f.shown == "not measured" for f in empty)


def script(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_extra
@needs_scripts
def test_report(tmp_path, capsys):
    results.write(tmp_path / "run.json", recorded())
    assert script("report").main([str(tmp_path / "run.json"), "--output", str(tmp_path / "docs")]) == 0
    assert "figures missed: 0" in capsys.readouterr().out
    text = (tmp_path / "docs" / "speed.md").read_text()
    pictures = {path.name for path in (tmp_path / "docs").glob("*.svg")}
    assert pictures == {f"speed-{name}.svg" for name in (
        "batch-norm-nchw", "batch-norm-nhwc", "batch-norm-mc", "losses-optimizers", "activations", "limit", "sizes",
        "threads")}
    for name in pictures:
        assert f"({name})" in text
    for part in ("deepspeed is not installed", "reached", "| Adam | 10.00 (10.00)", "One thread", "(64,256) forward"):
        assert part.lower() in text.lower()
    for line in text.splitlines():  # tables are whole
        if line.startswith("|"):
            assert line.endswith("|")


@needs_extra
@needs_scripts
def test_brief_report(tmp_path):
    results.write(tmp_path / "run.json", recorded())
    assert script("report").main([str(tmp_path / "run.json"), "--output", str(tmp_path), "--brief", "speed-there"]) == 0
    text = (tmp_path / "speed-there.md").read_text()
    assert text.startswith("# Speed on ")
    assert "| Adam | 10.00 (10.00)" in text
    assert "(64,256) forward" in text
    assert not (tmp_path / "speed.md").exists()


@needs_scripts
def test_report_of_no_results(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    for file in ("absent.json", "x.json"):
        assert script("report").main([str(tmp_path / file)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("report: ")
        assert error.count("\n") == 1


@needs_scripts
def test_compare_with_itself(capsys):
    root = SCRIPTS.parent
    if not list(root.glob("fastnorm/_kernels/*/batchnorm*.so")):
        pytest.skip("needs a checkout that was built in place")
    compare = script("compare")
    assert compare.main([str(root), str(root), "--only", "softmax (128,10)", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "softmax (128,10) float64" in out
    assert "geometric mean" in out
    assert compare.main(["no-such-revision", str(root)]) == 2
    assert capsys.readouterr().err.startswith("compare: no-such-revision: ")


# -- the command line --------------------------------------------------------------------------------------------------


@needs_extra
def test_bench(tmp_path, capsys):
    threads = fn.get_num_threads()
    options = ["--only", "forward (64,256)", "--seconds", "0.05", "--threads", "1", "--rivals", "none"]
    assert main(["bench", *options, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]) == 0
    out = capsys.readouterr().out
    assert fn.get_num_threads() == threads
    for part in ("batch norm forward (64,256)", "x twin", "geometric mean", f"wrote {tmp_path / 'b.json'}", "drew"):
        assert part in out
    (row,) = results.read(tmp_path / "b.json")["rows"]
    assert row["case"]["name"] == "batch norm forward (64,256)"
    assert {t["rival"] for t in row["times"]} == {"fastnorm", "twin"}
    assert "batch norm forward (64,256)" in (tmp_path / "b.svg").read_text()


MISTAKES = [
    (["--foo"], "unknown option or argument: --foo"),
    (["--threads", "0"], "--threads: expected an integer in [1, 1024], got '0'"),
    (["--seconds", "0"], "--seconds: expected a number in (0, inf), got '0'"),
    (["--seconds", "nan"], "--seconds: expected a number in (0, inf), got 'nan'"),
    (["--only", "convolution"], "--only: no case matches 'convolution'"),
    (["--rivals", "keras"], "--rivals: expected names among PyTorch, torch.compile, JAX, thinc, DeepSpeed, or none; "
                            "got 'keras'"),
    (["--plot", "figure.docx"], "--plot: figure.docx: expected a file name that ends in one of"),
    (["--plot", "absent/figure.png"], "--plot: absent: no such directory"),
    (["--json", "absent/run.json"], "--json: absent: no such directory"),
    (["--json", "."], "--json: .: expected a file name, got a directory"),
    (["--full"], "--full: takes an hour or more, expected --json FILE"),
]


@needs_extra
@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value))
def test_mistake(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_extra(module, tmp_path):
    done = run_without([module], "bench", "--plot", tmp_path / "figure.png")
    assert (done.returncode, done.stdout) == (2, "")
    if module not in done.stderr and MISSING:
        pytest.skip(f"another one is missing first: {', '.join(MISSING)}")
    assert_one_line(done.stderr, f"{module} is not installed", "pip install", "fastnorm[bench]")
