"""The search for tiles, its time planned: what it chooses, refuses, keeps, and leaves."""
import fake_cupy
import numpy as np
import pytest

import cnn
from kernels import ops
from kernels.cuda import backend, gpu, tune, tuned
from kernels.cuda.compiler import file_name
from kernels.cuda.conv_gemm import PLANE, WHOLE
from kernels.cuda.errors import CudaError
from kernels.cuda.host import conv, splitk
from kernels.cuda.host.conv_choice import MMA_TILES, TILES
from kernels.cuda.launch import Choice, CudaOptions
from kernels.cuda.tune import Layer
from kernels.cuda.workers import Workers
from kernels.ops import Conv2d, Linear, TensorSpec

CHANNELS = 24       # of outputs, which no other tensor has
LARGE, SMALL = TILES["float32"][1], TILES["float32"][2]


def layer(name, pixels=30, channels=64, op=None, residual=False):
    shapes = (1, 5, pixels // 5, channels), (CHANNELS, 1, 1, channels), (CHANNELS,)
    output = TensorSpec((*shapes[0][:3], CHANNELS))
    return Layer(name, op or Conv2d(), [*map(TensorSpec, shapes), *[output] * residual], output)


def linear(name, samples, features=256):
    shapes = (samples, features), (CHANNELS, features), (CHANNELS,)
    return Layer(name, Linear(), list(map(TensorSpec, shapes)), TensorSpec((samples, CHANNELS)))


class Clock:
    """A launch takes what `cost` says of its kernels' names; time passes by `step` a timing."""

    def __init__(self, cost, step=0.0, noise=0.0):
        self.cost, self.step, self.noise = cost, step, noise
        self.seconds, self.timed = 0.0, []

    def now(self):
        return self.seconds

    def timer(self, launches):
        names = "+".join(launch.kernel.name for launch in launches)

        def microseconds():
            self.seconds += self.step
            self.timed.append(names)
            return self.cost(names) + self.noise * (len(self.timed) * 7919 % 13 / 12)
        return microseconds


class Ready:
    """Workers that have compiled everything."""

    def __init__(self, kernels, arch, jobs):
        self.kernels = list(kernels)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait(self, kernels, until):
        return True


@pytest.fixture
def found(machine, monkeypatch, tmp_path):
    """Function (layers, clock, wrong=names of kernels, **options) -> the TuneReport of a search in
    which no kernel runs: those in `wrong` give other results than the rest."""
    cupy = machine()
    monkeypatch.setattr(tuned, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(tune, "Workers", Ready)

    def search(layers, clock, wrong=(), budget=60.0, choices=None, **options):
        def execute(launches):
            for array in launches[-1].args:
                if getattr(array, "shape", ())[-1:] == (CHANNELS,) and array.ndim > 1:
                    array[...] = 2 if launches[0].kernel.name in wrong else 1
        monkeypatch.setattr(tune, "execute", execute)
        given = CudaOptions(arch="sm_90a", multiprocessors=4, upload=cupy.asarray,
                            tuned=choices or {})
        return tune.tune(layers, given, gpu.gpu(0), budget, clock=clock, **options)
    return search


def name_of(tile, splits=1):
    return conv.conv_kernel("float32", tile, "clip", PLANE if splits > 1 else WHOLE).name


def prefers(*names):
    """These cost 5 us, then 6, ...; all others 100."""
    return lambda timed: next((5.0 + i for i, name in enumerate(names)
                               if name in timed), 100.0)


def test_the_fastest_is_chosen_saved_and_named(found):
    report = found([layer("a"), layer("b")], Clock(prefers(name_of(LARGE))))
    (outcome,) = report.outcomes
    assert outcome.layers == ("a", "b")         # sizes are the same: one search
    assert outcome.after == Choice(LARGE, 1) != outcome.before
    assert (outcome.before_microseconds, outcome.after_microseconds) == (100.0, 5.0)
    assert outcome.tried >= 4
    assert (report.left, report.interrupted) == ([], False)
    assert report.changed == [outcome]
    assert tuned.load(gpu.gpu(0)) == {outcome.problem: Choice(LARGE, 1)}
    assert report.path == tuned.path_of(gpu.gpu(0))


def test_a_kernel_with_other_results_is_never_chosen(found, caplog):
    wrong, right = name_of(LARGE), name_of(TILES["float32"][3])
    report = found([layer("a")], Clock(prefers(wrong, right)), wrong={wrong})
    (outcome,) = report.outcomes
    assert outcome.after == Choice(TILES["float32"][3], 1)
    assert outcome.refused == (Choice(LARGE, 1),)
    assert "gives other results than" in caplog.messages[-1]
    assert LARGE not in [choice.tile for choice in tuned.load(gpu.gpu(0)).values()]


def test_an_output_that_nobody_writes_is_another_result(found, monkeypatch):
    one = layer("a")
    report = found([one], Clock(lambda timed: 100.0))       # sets up `execute`
    writes = tune.execute
    monkeypatch.setattr(tune, "execute", lambda launches: None if launches[0].kernel.name
                        == name_of(LARGE) else writes(launches))
    options = CudaOptions(arch="sm_90a", multiprocessors=4, upload=gpu.cupy().asarray)
    (problem,) = tune.problems_of([one], options)
    outcome = tune.measure(problem, options, Clock(prefers(name_of(LARGE))))
    assert outcome.after == outcome.before == report.outcomes[0].before
    assert outcome.refused == (Choice(LARGE, 1),)


def test_a_gain_within_the_noise_changes_nothing(found):
    (outcome,) = found([layer("a")], Clock(
        lambda timed: 99.0 if timed.startswith(name_of(LARGE)) else 100.0, noise=10.0)).outcomes
    assert outcome.after == outcome.before
    (outcome,) = found([layer("a")], Clock(
        lambda timed: 80.0 if timed.startswith(name_of(LARGE)) else 100.0, noise=10.0)).outcomes
    assert outcome.after == Choice(LARGE, 1)


def test_what_was_fast_by_luck_must_be_so_again(found):
    clock = Clock(lambda timed: 100.0)
    first = name_of(LARGE)

    def lucky(timed):
        races = clock.timed.count(first) // (tune.ROUNDS + 1)
        return 5.0 if timed == first and races == 0 else 100.0
    clock.cost = lucky
    (outcome,) = found([layer("a")], clock).outcomes
    assert outcome.after == outcome.before
    assert len(clock.timed) == tune.ROUNDS * (outcome.tried + 2)


def test_each_choice_is_timed_in_turn_with_the_present_one(found):
    clock = Clock(lambda timed: 10.0)
    (outcome,) = found([layer("a")], clock).outcomes
    assert len(clock.timed) == tune.ROUNDS * outcome.tried
    rounds = [clock.timed[i:i + outcome.tried]
              for i in range(0, len(clock.timed), outcome.tried)]
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)
    assert rounds[0] == rounds[1][::-1]


def test_few_samples_may_become_a_matrix_product_and_splits_are_tried(found):
    clock = Clock(prefers("conv_"))
    (outcome,) = found([linear("fc", 4)], clock).outcomes
    assert outcome.before == Choice(None)
    assert outcome.after.tile is not None
    assert any("splitk" in timed for timed in clock.timed)
    (outcome,) = found([linear("fc", 4)], Clock(prefers("gemv")),
                       choices={outcome.problem: outcome.after}).outcomes
    assert outcome.after == Choice(None)
    (outcome,) = found([linear("fc", 5)], clock := Clock(prefers("conv_"))).outcomes
    assert not any("gemv" in timed for timed in clock.timed)


def test_only_layers_among_whose_kernels_there_is_a_choice_are_searched(found):
    shapes = (1, 5, 6, CHANNELS), (CHANNELS, 3, 3, 1)
    depthwise = Layer("depthwise", Conv2d(padding=(1, 1, 1, 1), groups=CHANNELS),
                      list(map(TensorSpec, shapes)), TensorSpec(shapes[0]))
    relu = Layer("relu", ops.Relu(), [TensorSpec((3,))], TensorSpec((3,)))
    report = found([depthwise, relu, layer("a", residual=True)], Clock(prefers(name_of(LARGE))))
    assert [one.layers for one in report.outcomes] == [("a",)]


@pytest.mark.parametrize(("dtype", "count"), [("float16", 0), ("float32", 1)])
def test_a_layer_that_has_a_kernel_of_its_own_is_left_out(dtype, count):
    shapes = (1, 5, 6, 3), (CHANNELS, 3, 3, 3), (1, 5, 6, CHANNELS)
    *inputs, output = (TensorSpec(shape, dtype) for shape in shapes)
    first = Layer("first", Conv2d(padding=(1, 1, 1, 1)), inputs, output)
    options = CudaOptions(dtype=dtype, arch="sm_90a")
    assert len(tune.problems_of([first], options)) == count


def test_a_budget_of_nothing_searches_nothing(found):
    clock = Clock(lambda timed: 10.0)
    report = found([layer("a"), linear("fc", 9)], clock, budget=0.0)
    assert (report.outcomes, report.path, clock.timed) == ([], None, [])
    assert set(report.left) == {"a", "fc"}


def test_what_takes_longest_comes_first_and_what_is_tuned_last(found):
    small, large = layer("small"), layer("large", pixels=3000, channels=512)
    told = []
    report = found([small, large], Clock(lambda timed: 10.0, step=1.0), budget=1.0,
                   progress=lambda *now: told.append(now))
    assert [one.layers for one in report.outcomes] == [("large",)]
    assert report.left == ["small"]
    assert told == [(0, 2, "large"), (1, 2, "small"), (1, 2, "")]
    report = found([small, large], Clock(lambda timed: 10.0, step=1.0), budget=1.0,
                   choices=tuned.load(gpu.gpu(0)))
    assert [one.layers for one in report.outcomes] == [("small",)]


def test_what_is_not_compiled_in_time_is_left(found, monkeypatch):
    monkeypatch.setattr(Ready, "wait", lambda self, kernels, until: False)
    clock = Clock(lambda timed: 10.0)
    report = found([layer("a")], clock)
    assert (report.outcomes, report.left, clock.timed) == ([], ["a"], [])


def test_an_interrupt_keeps_what_was_found(found):
    clock = Clock(prefers(name_of(LARGE)))

    def progress(done, total, name):
        if name == "small":
            raise KeyboardInterrupt
    report = found([layer("small"), layer("large", pixels=3000, channels=512)], clock,
                   progress=progress)
    assert report.interrupted
    assert report.left == ["small"]
    assert list(tuned.load(gpu.gpu(0))) == [report.outcomes[0].problem]


def test_a_folder_that_can_not_be_written_is_said(found, monkeypatch, tmp_path, caplog):
    (tmp_path / "tuned").write_text("a file")
    report = found([layer("a")], Clock(prefers(name_of(LARGE))))
    assert report.changed
    assert report.path is None
    assert "can not be saved in" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TILES)
def test_no_right_kernel_is_refused(machine, dtype):
    """All tiles, whole and split: the same bits, also where an activation and a residual round."""
    cupy = machine()
    stored = conv.stored_as(dtype)
    shapes = (1, 6, 7, 20), (CHANNELS, 3, 3, 20), (CHANNELS,), (1, 6, 7, CHANNELS)
    specs = [TensorSpec(shape, stored) for shape in shapes]
    op = Conv2d(padding=(1, 1, 1, 1), activation=ops.Silu())
    options = CudaOptions(dtype=dtype, arch="sm_90a", multiprocessors=4, upload=lambda array:
                          cupy.asarray(array.view(np.uint16) if dtype == "bfloat16"
                                       and array.itemsize == 2 else array))
    (problem,) = tune.problems_of([Layer("a", op, specs, specs[3])], options)
    data = tune.Data.random(problem, options)
    results = {data.result(problem, Choice(tile, splits)) for tile in TILES[dtype]
               for splits in (1, 2)}
    assert len(results) == 1
    (result,) = results
    assert set(result) != {tune.POISON}


def test_real_kernels_agree_bit_by_bit(machine, monkeypatch, tmp_path):
    """In the emulator: all that runs on a GPU but the time. Few choices, for it is slow."""
    cupy = machine()
    monkeypatch.setattr(tuned, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(tune, "Workers", Ready)
    monkeypatch.setattr(tune, "candidates", lambda *sizes: [
        (1.0, Choice(SMALL, 1)), (1.0, Choice(SMALL, 2)), (1.0, Choice(LARGE, 1))])
    options = CudaOptions(arch="sm_90a", multiprocessors=4, upload=cupy.asarray)
    for name in ("_splitk", name_of(LARGE)):
        clock = Clock(lambda timed, name=name: 5.0 if name in timed else 50.0)
        report = tune.tune([layer("a", residual=True)], options, gpu.gpu(0), 60.0, clock=clock)
        (outcome,) = report.changed
        assert outcome.after == (Choice(SMALL, 2) if name == "_splitk" else Choice(LARGE, 1))
        assert not outcome.refused
    assert {call.name for call in cupy.calls} >= {name_of(LARGE), name_of(SMALL)}
    assert options.packed == {}


@pytest.fixture
def planned(machine, monkeypatch, tmp_path):
    """A GPU on which the second of two tiles is faster for convolutions; (CuPy, its name)."""
    cupy = machine()
    monkeypatch.setattr(tuned, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(tune, "Workers", Ready)
    monkeypatch.setattr(tune, "candidates", lambda *sizes: [(1.0, Choice(SMALL, 1)),
                                                            (1.0, Choice(LARGE, 1))])
    fast = name_of(LARGE)
    monkeypatch.setattr(tune, "GpuClock", lambda gpu: Clock(prefers(fast)))
    return cupy, fast


def ran(cupy, model):
    """Names of the convolutions that a prediction runs."""
    cupy.calls.clear()
    model.predict(np.ones((1, 16, 16, 3), np.float32))
    return [call.name for call in cupy.calls if call.name.startswith("conv_simt")]


def test_a_model_is_prepared_anew_and_the_next_one_does_not_search(planned, small_model,
                                                                  monkeypatch):
    cupy, fast = planned
    model = cnn.load(small_model, device="cuda", preprocess="imagenet")
    expected = model.predict(np.ones((1, 16, 16, 3), np.float32))
    assert fast not in ran(cupy, model)
    packed, told = model._options.packed, []
    report = model.tune(progress=lambda *now: told.append(now))
    assert {one.layers for one in report.changed} == {("conv",), ("logits",)}
    assert told[0][:2] == (0, 2)
    assert ran(cupy, model) == (both := [fast, fast])
    np.testing.assert_allclose(model.predict(np.ones((1, 16, 16, 3), np.float32)), expected,
                               rtol=1e-5)
    assert model._options.packed is not packed      # what was packed for other tiles is let go
    assert any(fast in row.kernel for row in model.summary().rows)

    monkeypatch.setattr(tune, "measure", None)
    assert ran(cupy, cnn.load(small_model, device="cuda", preprocess="imagenet")) == both


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_search_on_a_gpu(small_model, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "cache_root", lambda: tmp_path)
    model = cnn.load(small_model, device="cuda", dtype=dtype)
    batch = np.random.default_rng(0).standard_normal((8, 16, 16, 3)).astype(np.float32)
    expected = model.predict(batch)
    report = model.tune(batch_size=8, budget=60.0)
    assert {layer for one in report.outcomes for layer in one.layers} == {"conv", "logits"}
    assert (report.left, report.interrupted) == ([], False)
    for one in report.outcomes:
        assert one.refused == ()
        assert 0 < one.after_microseconds <= one.before_microseconds
    # Probabilities; float16 may round a sum that is added in another order the other way.
    np.testing.assert_allclose(model.predict(batch), expected, atol=0.01)
    assert cnn.load(small_model, device="cuda", dtype=dtype)._options.tuned == report.choices


def test_choices_that_can_not_be_saved_serve_the_model(planned, small_model, tmp_path):
    cupy, fast = planned
    (tmp_path / "tuned").write_text("a file")
    model = cnn.load(small_model, device="cuda", preprocess="imagenet")
    assert model.tune().path is None
    assert ran(cupy, model) == [fast, fast]


def test_a_model_that_is_not_on_a_gpu_can_not_be_tuned(small_model, planned):
    for device in ("cpu", "emulator"):
        model = cnn.load(small_model, device=device)
        with pytest.raises(cnn.DeviceError, match=f"runs on '{device}'; load it with device='cuda"):
            model.tune()
    model = cnn.load(small_model, device="cuda")
    with pytest.raises(cnn.ModelError, match="budget=-1 must be a number of seconds, 0 or more"):
        model.tune(budget=-1)


@pytest.mark.parametrize("free", [1 << 20, 16 << 20])
def test_a_batch_that_is_too_large_is_told(planned, small_model, free):
    """A layer's input of 12 MB has no room, or its output of 8 MB beside it."""
    cupy, _ = planned
    model = cnn.load(small_model, device="cuda", preprocess="imagenet")
    cupy.free = free
    with pytest.raises(cnn.DeviceError, match=r"^cuda:0 has no room for a layer beside what is "
                                              r"there: .* free; tune for a smaller batch"):
        model.tune(4000)


def test_the_command_lists_what_changed_and_where_it_is(planned, small_model, cnn):
    status, out, _ = cnn("tune", small_model)
    assert status == 0
    assert "128x64 tiles, 32 bytes deep" in out
    assert f"Saved in {tuned.path_of(gpu.gpu(0))}." in out
    status, out, _ = cnn("tune", small_model)
    assert status == 0
    assert "0 got a faster kernel. Saved in" in out         # it was the fastest, and is still


def test_the_command_says_what_the_budget_left(planned, small_model, cnn):
    status, out, _ = cnn("tune", small_model, "--budget", 0)
    assert status == 0
    assert "Nothing is saved. 2 layers are left, for the budget was spent" in out
    status, out, err = cnn("tune", small_model, "--device", "cpu")
    assert (status, out) == (1, "")
    assert "tuning measures kernels on a GPU" in err


def test_an_interrupted_command_keeps_what_was_found(planned, small_model, monkeypatch, cnn):
    measure, seen = tune.measure, []

    def interrupted(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(measure(*arguments))
        return seen[0]
    monkeypatch.setattr(tune, "measure", interrupted)
    status, out, _ = cnn("tune", small_model)
    assert status == 130
    assert "1 layers are left, for the search was interrupted" in out
    assert list(tuned.load(gpu.gpu(0))) == [seen[0].problem]


def test_events_time_a_graph_after_the_cache_was_written_over(machine, monkeypatch):
    cupy = machine()
    flushed = []
    memory = property(lambda array: type("Memory", (), {
        "memset_async": lambda self, value, size, stream: flushed.append(
            (size, cupy.replays))})())
    monkeypatch.setattr(fake_cupy.ndarray, "data", memory, raising=False)
    monkeypatch.setattr(tune, "LEAST_FLUSH", 0)
    cupy.cost = lambda name: 0.25
    clock = tune.GpuClock(gpu.gpu(0))
    x = cupy.asarray(np.ones(64, np.float32))
    step = backend.prepare(ops.Relu(), [TensorSpec((64,))], TensorSpec((64,)), [None],
                           CudaOptions())
    with cupy.cuda.Stream(non_blocking=True):
        timer = clock.timer(list(step.bind([x], x, None)) * 2)
        assert cupy.calls == []                 # captured, not run
        assert timer() == timer() == pytest.approx(500.0)
    assert flushed == [(2 * (1 << 16), 0), (2 * (1 << 16), 1)]
    assert len(cupy.calls) == 4


def test_kernels_are_compiled_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    kernel, other = splitk.kernel_of("float32", 1, "clip"), splitk.kernel_of("float32", 4, "clip")
    with Workers([kernel, kernel, other], "sm_90a", 1) as workers:
        assert not workers.wait([other], lambda: True)
        assert workers.wait([kernel], lambda: False)
        begun = list(workers._running.values())
    assert all(process.returncode is not None for process in begun)
    assert list(tmp_path.glob(f"cuda-*/{file_name(kernel, 'sm_90a.cubin')}"))
    with Workers([kernel], "sm_90a", 1) as workers:
        assert not workers._running             # nothing is left to do


def test_a_kernel_that_can_not_be_compiled_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_CACHE_DIR", str(tmp_path))
    kernel = conv.conv_kernel("float16", MMA_TILES[0], "clip", WHOLE)
    with Workers([kernel], "sm_75", 1) as workers, pytest.raises(
            CudaError, match=f"{kernel.name} can not be compiled for sm_75: .* needs a GPU of"):
        workers.wait([kernel], lambda: False)
