"""The accuracy report: how errors are counted, every kernel within its bound, none behind PyTorch, the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_demo_cli import assert_one_line

from fastnorm import _runtime
from fastnorm.__main__ import main
from fastnorm._accuracy import bounds, cases, command, measure, references, table
from fastnorm._accuracy.measure import PYTORCH, Error, Row
from fastnorm._accuracy.references import Exact
from fastnorm._bench import rivals

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
LONG_DOUBLE = pytest.mark.skipif(not measure.HAS_LONG_DOUBLE, reason="long double is no longer than double here")
ALL = cases.every(quick=True, exhaustive=False)
KERNELS = list(dict.fromkeys(case.kernel for case in ALL))


# -- how errors are counted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=LONG_DOUBLE)], ids=str)
def test_ulp_is_the_spacing(dtype, rng):
    info = np.finfo(dtype)
    every_exponent = np.ldexp(rng.uniform(0.5, 1, 500), rng.integers(info.minexp - 20, info.maxexp, 500))
    x = np.append(every_exponent, [0, info.smallest_subnormal, info.tiny, 1, 2, info.max / 2]).astype(dtype)
    wide = np.float64 if dtype == F32 else np.longdouble
    np.testing.assert_array_equal(measure.ulp(x.astype(wide), dtype), np.spacing(x).astype(wide))


def errors(got, value, scale=None):
    value = np.array(value, np.float64)
    exact = Exact(value, np.abs(value) if scale is None else np.array(scale, np.float64))
    return measure.errors_in_ulp(np.array(got, np.float32), measure.target(exact, F32)).tolist()


def test_errors_by_hand():
    one = 2.0**-23
    assert errors([1 + one, 1, 2], [1, 1 + one / 4, 2 - one]) == [1, 0.25, 1]
    assert errors([one], [0.0], [1.0]) == [1]
    assert errors([2.0**-149], [0.0]) == [1]  # subnormals have one spacing


def test_errors_beyond_the_range():
    nan, inf = np.nan, np.inf
    assert errors([inf, -inf, nan], [1e39, -inf, nan]) == [0, 0, 0]
    assert errors([3e38, inf, nan, 0, 1], [1e39, -inf, inf, nan, nan]) == [inf] * 5
    assert errors([inf, nan], [1, 1]) == [inf, inf]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"expected shape \(2,\), got \(1, 2\)"):
        measure.errors_in_ulp(np.zeros((1, 2)), measure.target(Exact(np.zeros(2), np.zeros(2)), F32))


@LONG_DOUBLE
@pytest.mark.parametrize("kernel", KERNELS)
def test_references_agree_in_both_precisions(kernel):
    """The formulas themselves are stable: float64 and long double differ by far less than an ulp of float32."""
    for case in ALL:
        if case.kernel == kernel and case.dtype == F32:
            inputs = case.make(0)
            short, long = (references.exact(kernel, inputs, np.dtype(wide)) for wide in (np.float64, np.longdouble))
            for name, (value, scale) in long.items():
                with np.errstate(invalid="ignore"):
                    error = np.abs(short[name].value - value) / measure.ulp(scale, F32)
                assert np.nanmax(error) < 0.01, (case.name, name)


def test_every_binade_once():
    """An exhaustive run meets each finite float32 x <= 0."""
    every = [case for case in cases.every(False, exhaustive=True) if case.kernel == "exp" and case.dtype == F32]
    assert [case.chunks for case in every] == [255]
    first, last = every[0].make(0)["x"], every[0].make(254)["x"]
    assert np.signbit(first[0])
    assert (first[0], last[-1]) == (0, np.finfo(F32).min)
    assert len(first) == len(last) == 2**23


# -- the kernels -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pytorch():
    return command.load_pytorch()[0]


@pytest.fixture(scope="module")
def rows(pytorch):
    """All rows of the quick run, by kernel."""
    chosen = [case for case in ALL if case.dtype == F32 or measure.HAS_LONG_DOUBLE]
    found = {kernel: [] for kernel in KERNELS}
    for case in chosen:
        found[case.kernel] += measure.measure(case, _runtime.available_levels(), pytorch)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_within_bounds(rows, kernel):
    assert rows[kernel]
    assert [table.line(row) for row in rows[kernel] if not row.within_bound] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_not_behind_pytorch(rows, pytorch, kernel):
    """PyTorch is closer by no more than chance."""
    if pytorch is None:
        pytest.skip("PyTorch is not installed")
    behind = [table.line(row) for row in rows[kernel] if row.behind]
    assert behind == []


def test_behind_means_by_more_than_chance():
    row = Row("softmax", "p", "any", "float32", 4.0, {"avx2": Error(1.5), PYTORCH: Error(0.6)})
    assert not row.behind
    row.errors["baseline"] = Error(1.7)
    assert row.behind
    assert row.within_bound
    row.errors[PYTORCH] = Error(1.2)
    assert not row.behind
    row.errors["baseline"] = Error(np.inf)
    assert not row.within_bound


def test_median_of_seeds_is_what_counts():
    ours, theirs = Error(), Error()
    for largest in (20.0, 3.0, 4.0):
        ours.add(np.array([largest]))
        theirs.add(np.array([4.0]))
    row = Row("RMSProp", "params", "any", "float32", 25.0, {"avx2": ours, PYTORCH: theirs}, seeds=True)
    assert not row.behind
    row.seeds = False
    assert row.behind


def test_mean_gap_leaves_out_what_is_the_same():
    def row(ours, theirs):
        errors = {"baseline": Error(9, 90, 10), "avx2": Error(1, 10 * ours, 10), PYTORCH: Error(1, 10 * theirs, 10)}
        return Row("softmax", "p", "any", "float32", 4.0, errors)

    assert row(0.25, 0.2501).mean_gap == row(0.2519, 0.25).mean_gap == row(1.0195, 1.0).mean_gap == 0
    assert row(0.30, 0.25).mean_gap == pytest.approx(0.05)
    assert row(0.20, 0.25).mean_gap == pytest.approx(-0.05)
    assert row(0.25, np.inf).mean_gap == -np.inf
    assert row(np.inf, np.inf).mean_gap == 0
    assert Row("exp", "exp", "any", "float32", 2.0, {"avx2": Error(1, 1, 1)}).mean_gap == 0


# -- the command line --------------------------------------------------------------------------------------------------

ONE = ["accuracy", "--quick", "--only", "SOFTMAX 10 classes"]


def test_command_writes_what_it_measured(tmp_path, capsys):
    files = tmp_path / "rows.json", tmp_path / "page.md"
    assert main([*ONE, "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    printed = capsys.readouterr().out
    found = json.loads(files[0].read_text())
    assert {row["kernel"] for row in found["rows"]} == {"softmax", "log-softmax"}
    assert all(set(_runtime.available_levels()) <= set(row["errors"]) for row in found["rows"])
    page = files[1].read_text()
    for text in (printed, page):
        assert "rows are within their bounds" in text
    assert "## log-softmax" in page


def test_command_without_pytorch(monkeypatch, capsys):
    def absent():
        raise rivals.AbsentError("torch is not installed")

    monkeypatch.setattr(command, "PyTorch", absent)
    assert main(ONE) == 0
    printed = capsys.readouterr().out
    assert "left out: torch is not installed" in printed
    assert "PyTorch's" not in printed


def test_command_without_long_double(monkeypatch, capsys):
    monkeypatch.setattr(command, "HAS_LONG_DOUBLE", False)
    assert main(ONE) == 0
    printed = capsys.readouterr().out
    assert "left out: long double is no longer than double here" in printed
    assert " float64 " not in printed


def test_command_fails_beyond_a_bound(monkeypatch, capsys):
    monkeypatch.setitem(bounds.ULPS, ("softmax", "p"), 0.0)
    with pytest.raises(SystemExit) as status:
        main(ONE)
    assert status.value.code == 1
    assert "beyond its bound" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "words"), [
    (["--only", "no such kernel"], "--only: no case matches 'no such kernel'"),
    (["--markdown", "/nowhere/page.md"], "--markdown: /nowhere: no such directory"),
])
def test_command_mistakes(arguments, words, capsys):
    assert main(["accuracy", "--quick", *arguments]) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.skipif(not PAGE.exists(), reason="tests run outside a checkout")
def test_page_has_every_case():
    """The committed page is of the cases of today: `python -m fastnorm accuracy --markdown docs/accuracy.md`, which may
    have been run with --quick.
    """
    page = PAGE.read_text(encoding="utf-8")
    sections = dict(section.split("\n", 1) for section in page.split("\n## ")[1:])
    for case in cases.every(quick="as of --quick" in page, exhaustive=False):
        assert f"| {case.data} | {case.dtype.name} |" in sections[case.kernel], case.name
