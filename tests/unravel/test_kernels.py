"""The compiled loops against the tensor operations that they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import FOLLOWED, captioner
from test_conservation import record
from test_evidence import ROWS, evidence, rows_of
from test_independence import tied

from captionfix.unravel import Policy, kernels, start, walk
from captionfix.unravel.evidence import Evidence, settle

pytest.importorskip("numba", reason="the compiled loops need numba")
ENGINE = settings(settings.get_profile("engine"), max_examples=50)


@pytest.fixture(scope="module")
def switched():
    """Sets whether the loops are used."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda on: patch.setattr(kernels, "wanted", on)


def both(switched, compute):
    results = []
    for on in (True, False):
        switched(on)
        assert kernels.usable(torch.zeros(1)) is on
        results.append(compute())
    return results


@ENGINE
@given(rows=ROWS, budget=st.sampled_from([None, 1, 2, 5]))
def test_settled_tables_are_the_same(switched, rows, budget):
    loops, tensors = both(switched, lambda: rows_of(settle([evidence(rows)], 4, budget)))
    assert [r[0] for r in loops] == sorted(r[0] for r in loops)
    if budget is None:
        assert sorted(loops) == sorted(r for r in tensors if r[3] > 0)
        return
    for word in range(4):  # of two equal masses either may stay, so masses are compared and not their places
        mine, theirs = (sorted(r[3] for r in table if r[0] == word and r[3] > 0) for table in (loops, tensors))
        assert mine == pytest.approx(theirs, abs=1e-12)
        assert len(mine) <= budget
    everything = {r[:3] for r in rows_of(evidence(rows))}
    assert {r[:3] for r in loops} <= everything
    assert len({r[:3] for r in loops}) == len(loops)


@ENGINE
@given(seed=st.integers(0, 1000), budget=st.integers(1, 400), kind=st.sampled_from([torch.float32, torch.float64]))
def test_the_heaviest_of_many_are_the_same(switched, seed, budget, kind):
    generator = torch.Generator().manual_seed(seed)
    word, element = (torch.randint(0, most, (1500,), generator=generator) for most in (4, 600))
    mass = torch.rand(1500, generator=generator, dtype=kind) ** (1 + 40 * torch.rand((), generator=generator))
    mass[::5] = mass[0]  # equal ones among them
    table = Evidence(word, element, torch.ones_like(mass), mass / mass.sum())
    for mine, theirs in zip(*both(switched, lambda: by_word(settle([table], 4, budget))), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4 if kind == torch.float32 else 1e-9, atol=1e-12)


def by_word(table):
    """The sorted masses of each word."""
    return [table.mass[table.word == word].sort().values for word in range(4)]


@ENGINE
@given(rows=ROWS)
def test_distinct_neurons_are_the_same(switched, rows):
    table = evidence(rows)
    for neurons, direction, which in both(switched, table.neurons):
        assert neurons[which].tolist() == table.element.tolist()
        assert direction[which].tolist() == table.direction.tolist()
        assert len({*zip(neurons.tolist(), direction.tolist(), strict=True)}) == len(neurons)


CONVOLUTIONS = st.fixed_dictionaries(
    {
        "dimensions": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 4]),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "keep": st.sampled_from([1, 4, 16, 1000]),
    }
)


@ENGINE
@given(c=CONVOLUTIONS, seed=st.integers(0, 1000))
def test_contributors_of_any_convolution_are_the_same(switched, c, seed):
    torch.manual_seed(seed)
    n = c["dimensions"]
    layer = getattr(torch.nn, f"Conv{n}d")(
        8, 12, c["kernel"], c["stride"], c["padding"], c["dilation"], c["groups"]
    ).double()
    with torch.no_grad():
        trace, x, out = recorded(layer, torch.randn(2, 8, *(6, 7, 8)[:n], dtype=torch.float64))
    neurons = torch.randperm(out.numel)[:60]
    target = start(out, neurons, -1.0 if seed % 2 else 1.0)
    policy = Policy(convolutions=c["keep"], neurons=None)
    loops, tensors = both(switched, lambda: ended(walk(trace, [(out, target)], policy), x, len(neurons)))
    for mine, theirs in zip(loops, tensors, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


@ENGINE
@given(
    channels=st.integers(1, 700),
    keep=st.sampled_from([1, 4, 16, 90]),
    seed=st.integers(0, 1000),
    positions=st.sampled_from([1, 14, 1 << 22]),
)
def test_contributors_of_many_channels_are_the_largest(channels, keep, seed, positions):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, 6, generator=generator).round(decimals=1)  # with zeros and equal ones among them
    weights = torch.randn(5, channels, 2, generator=generator).round(decimals=1)
    neurons = torch.randperm(25, generator=generator)
    direction = torch.where(torch.rand(25, generator=generator) < 0.5, -1.0, 1.0)
    window = kernels.Window((5,), (6,), (2,), (1,), (0,), (1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_POSITIONS", positions)  # as if there were too many neurons to look up together
        element, share, towards = kernels.contributors(x, weights, neurons, direction, window, keep)
    for n, neuron in enumerate(neurons.tolist()):
        products = x[0, :, neuron % 5 : neuron % 5 + 2] * weights[neuron // 5] * direction[n]
        largest = products.flatten().sort(descending=True).values[: share.shape[1]].clamp_min(0)
        torch.testing.assert_close(share[n], largest / largest.sum().clamp_min(1e-30))
        kept = element[n][share[n] > 0]
        assert len(set(kept.tolist())) == len(kept)
        at, channel = kept % 6 - neuron % 5, kept // 6
        torch.testing.assert_close(products[channel, at] / largest.sum(), share[n][share[n] > 0])
        assert (towards[n][share[n] > 0] == torch.where(x[0, channel, kept % 6] < 0, -1.0, 1.0)).all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("keep", [1, 4, 16])
def test_numbers_that_are_not_finite_lead_to_no_element_that_is_not_there(odd, keep):
    """A network may clip what has overflowed before, so that its output shows nothing of it."""
    x, weights = torch.randn(1, 300, 4), torch.randn(5, 300, 2)
    x[0, ::7, 1], x[0, 5::11] = odd, 0
    window = kernels.Window((3,), (4,), (2,), (1,), (0,), (1,))
    element, _, _ = kernels.contributors(x, weights, torch.arange(15), torch.ones(15), window, keep)
    assert element.shape == (15, keep)
    assert 0 <= int(element.min()) <= int(element.max()) < x.numel()


def looked_up(seed, neurons=400):
    """What a convolution's look-up is asked, with equal contributions among it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 96, 100, generator=generator).round(decimals=1)
    weights = torch.randn(40, 96, 9, generator=generator).round(decimals=1)
    window = kernels.Window((10, 10), (10, 10), (3, 3), (1, 1), (1, 1), (1, 1))
    chosen = torch.randperm(2 * 40 * 100, generator=generator)[:neurons]
    direction = torch.where(torch.rand(neurons, generator=generator) < 0.3, -1.0, 1.0)
    return x, weights, chosen, direction, window, 4


def alike(mine, theirs):
    return all(torch.equal(m, t) for m, t in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 400])
def test_parts_give_what_one_gives(parts, monkeypatch):
    asked, word = looked_up(0), torch.arange(7).repeat_interleave(600)
    generator = torch.Generator().manual_seed(0)
    rows = (word, torch.randint(0, 300, word.shape, generator=generator), torch.ones(len(word)), torch.rand(len(word)))
    results = []
    for count in (1, parts):
        monkeypatch.setattr(
            kernels, "_in_parts", lambda loop, most, *given, count=count: loop(*given, min(count, most))
        )
        results.append((*kernels.contributors(*asked), *kernels.merge(*rows, 7, 50)))
    assert alike(*results)
    assert len(results[0][3]) == 7 * 50


def test_processors_are_used_and_threads_stay_as_they_were(monkeypatch):
    import numba

    from captionfix.unravel import loops

    monkeypatch.setattr(kernels, "_alone", False)
    asked, seen, before = looked_up(1), [], torch.get_num_threads()
    compute = loops.contributors
    monkeypatch.setattr(loops, "contributors", lambda *given: seen.append(given[-1]) or compute(*given))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernels.contributors(*asked)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1, min(2, numba.get_num_threads())]
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


def test_several_threads_may_look_up_at_once():
    asked = [looked_up(seed) for seed in range(8)]
    alone = [kernels.contributors(*each) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: kernels.contributors(*each), asked * 10))
    assert all(alike(mine, theirs) for mine, theirs in zip(together, alone * 10, strict=True))


IN_A_PROCESS = """
import os, sys, torch
from captionfix.unravel import kernels

torch.set_num_threads(2)
window = kernels.Window((10, 10), (10, 10), (3, 3), (1, 1), (1, 1), (1, 1))
asked = (torch.randn(1, 96, 100), torch.randn(40, 96, 9), torch.randperm(4000)[:800], torch.ones(800), window, 4)
before = kernels.contributors(*asked)
"""
FORKED = """
child = os.fork()
if not child:
    os._exit(0 if all(map(torch.equal, kernels.contributors(*asked), before)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
AGAIN = """
assert all(map(torch.equal, kernels.contributors(*asked), before))
print(kernels._alone)
"""


@pytest.mark.parametrize("pool", ["workqueue", "none such"])
def test_without_a_pool_for_several_threads_loops_run_alone(pool):
    """numba's own may not be used by two threads at once, and ends the process if it is."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": pool, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS + AGAIN], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_forked_process_looks_up_alone():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS + FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def recorded(layer, x):
    from captionfix.unravel import Trace

    with Trace(layer) as trace:
        at = trace.slot(trace.watch("x", x))
        out = trace.slot(layer(x))
    return trace, at, out


def ended(account, x, words):
    """Mass wanted higher, mass wanted lower, and what ended in the bias."""
    found = account.at(x)
    return (
        found.where(found.direction > 0).dense(words, x.numel),
        found.where(found.direction < 0).dense(words, x.numel),
        account.bias,
    )


@settings(settings.get_profile("engine"), max_examples=20)
@given(data=st.data())
def test_a_whole_captioner_unravels_alike(switched, data):
    network, pixels, tokens = captioner(lambda options: data.draw(st.sampled_from(options)))
    network.double()
    pixels = torch.randn(pixels.shape, dtype=torch.float64)
    assume(not tied(network, pixels, tokens))
    trace, image, words, _, logits = record(network, pixels, tokens)
    elements = [i * (logits.numel // 4) for i in range(4)]
    for name in ("default", "small", "full"):

        def compute(policy=FOLLOWED[name]):
            account = walk(trace, [(logits, start(logits, elements))], policy)
            return *ended(account, image, 4), *ended(account, words, 4)

        for mine, theirs in zip(*both(switched, compute), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7)


def test_other_types_take_the_tensor_operations(switched):
    switched(True)
    assert not kernels.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.usable(torch.zeros(1, device="meta"))
    assert kernels.usable(torch.zeros(1))
