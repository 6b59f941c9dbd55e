"""Progress lines, live curves and the table at the end, with a clock and memory figures of their own."""

import re
import types

import pytest
import torch
from transformers import TrainerControl, TrainerState

from glmhelpers.cost_model.step_memory import predict
from glmhelpers.lora.attach import attach_lora
from glmhelpers.plots.training import plot_progress
from glmhelpers.training import progress as watch
from glmhelpers.training.memory_plan import checkpointed, model_settings
from glmhelpers.training.progress import Watch, in_live_notebook, predicted_peaks
from glmhelpers.utils.units import clock, memory_size
from tests.helpers.reference import fresh_model
from tests.helpers.resumable_run import run

GIB = 2**30


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self):
        return self.now


def play(watcher, clock, losses=(2.0, 1.0, 0.5), seconds=10.0, tokens=5000):
    """Call a Watch as the Trainer does: one log each ten steps."""
    state, control = TrainerState(max_steps=10 * len(losses)), TrainerControl()
    watcher.on_train_begin(None, state, control)
    for loss in losses:
        clock.now += seconds
        state.global_step += 10
        state.num_input_tokens_seen += tokens
        watcher.on_log(None, state, control, {"loss": loss, "learning_rate": 1e-3})
    watcher.on_log(None, state, control, {"eval_loss": 0.75})
    watcher.on_log(None, state, control, {"train_runtime": 3.0})
    clock.now += seconds
    watcher.on_train_end(None, state, control)


def test_lines_say_speed_time_left_and_memory(capsys):
    clock = Clock()
    play(Watch(live=False, clock=clock, read=lambda: {"GPU 0": 7 * GIB, "GPU 1": 300 * 2**20}), clock)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step   10/30  loss 2.0000  500 tokens/s  0:20 left  GPU 0 7.00 GiB  GPU 1 300.0 MiB",
        "step   20/30  loss 1.0000  500 tokens/s  0:10 left  GPU 0 7.00 GiB  GPU 1 300.0 MiB",
        "step   30/30  loss 0.5000  500 tokens/s  0:00 left  GPU 0 7.00 GiB  GPU 1 300.0 MiB",
        "step   30/30  eval_loss 0.7500",
    ]


def test_the_table_lays_predicted_beside_measured():
    clock = Clock()
    prediction = types.SimpleNamespace(devices=(0, 1, "cpu"), peak_bytes=[6 * GIB, 5 * GIB, GIB])
    watcher = Watch(prediction, live=False, clock=clock, read=lambda: {"GPU 0": int(6.5 * GIB), "GPU 2": GIB})
    play(watcher, clock)
    assert watcher.table().splitlines() == [
        "steps       30 of 30",
        "time        0:40",
        "tokens      15,000",
        "speed       375 tokens/s",
        "peak CPU    predicted 1.00 GiB, not measured",
        "peak GPU 0  predicted 6.00 GiB, measured 6.50 GiB",
        "peak GPU 1  predicted 5.00 GiB, not measured",
        "peak GPU 2  not predicted, measured 1.00 GiB",
    ]


def test_a_resumed_run_counts_its_own_time_and_shows_its_whole_curve():
    clock = Clock()
    watcher, state = Watch(live=False, clock=clock, read=dict), TrainerState(max_steps=30)
    state.global_step, state.num_input_tokens_seen = 20, 10_000
    state.log_history = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval_loss": 1.5},
        {"step": 20},
    ]
    watcher.on_train_begin(None, state, None)
    clock.now += 5
    state.global_step, state.num_input_tokens_seen = 30, 12_500
    watcher.on_log(None, state, None, {"loss": 0.5})
    assert [point["step"] for point in watcher.points] == [10, 20, 20, 30]
    assert "steps       10 of 30" in watcher.table()
    assert "500 tokens/s" in watcher.table()


def test_tokens_are_the_real_ones_of_all_batches(tmp_path):
    from tests.helpers.resumable_run import rows

    watcher = Watch(live=False)
    run(tmp_path, max_steps=6, watch=watcher)
    # 18 rows are 3 steps: two epochs.
    assert watcher.tokens == 2 * sum(len(row["input_ids"]) for row in rows()[:18])


# Live ------------------------------------------------------------------------------------------------------------------


class Display:
    """Stands for a notebook's display: keeps what was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, figure, display_id=None):
        assert display_id is True
        self.shown.append(figure)
        return self

    def update(self, figure):
        self.shown.append(figure)


def test_in_a_notebook_one_figure_grows(monkeypatch, capsys):
    import IPython.display

    display, clock = Display(), Clock()
    monkeypatch.setattr(IPython.display, "display", display)
    play(Watch(live=True, clock=clock, read=lambda: {"GPU 0": GIB, "GPU 1": 2 * GIB}), clock)
    assert capsys.readouterr().out == ""
    assert len(display.shown) == 4
    losses, memory = display.shown[-1].axes
    assert list(losses.lines[0].get_ydata()) == [2.0, 1.0, 0.5]
    assert list(losses.lines[1].get_ydata()) == [0.75]
    assert [line.get_label() for line in memory.lines] == ["GPU 0", "GPU 1"]
    assert list(memory.lines[1].get_ydata()) == [2.0] * 4
    assert display.shown[-1].get_suptitle().startswith("step   30/30  loss 0.5000  500 tokens/s")


def test_without_a_gpu_there_is_no_memory_panel():
    assert len(plot_progress([{"step": 1, "loss": 2.0, "memory": {}}]).axes) == 1


def test_colabs_own_shell_is_a_notebook_too(monkeypatch):
    kernel = type("ZMQInteractiveShell", (), {})
    monkeypatch.setitem(watch.sys.modules, "IPython", types.SimpleNamespace(get_ipython=type("Shell", (kernel,), {})))
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert in_live_notebook()


@pytest.mark.parametrize(
    ("shell", "tqdm", "live"), [("ZMQInteractiveShell", "", True), ("ZMQInteractiveShell", "1", False)]
)
def test_moving_output_is_for_live_notebooks(shell, tqdm, live, monkeypatch):
    fake = types.SimpleNamespace(get_ipython=lambda: type(shell, (), {})())
    monkeypatch.setitem(watch.sys.modules, "IPython", fake)
    monkeypatch.setenv("TQDM_DISABLE", tqdm)
    assert in_live_notebook() is live


def test_a_plain_process_is_no_live_notebook():
    assert in_live_notebook() is False


# Words and figures -----------------------------------------------------------------------------------------------------


def test_times_and_sizes_are_readable():
    assert [clock(seconds) for seconds in (0, 59.6, 75, 3599, 4000, 90_000)] == [
        "0:00",
        "1:00",
        "1:15",
        "59:59",
        "1:06:40",
        "25:00:00",
    ]
    assert [memory_size(size) for size in (GIB, GIB // 2, GIB // 2 - 1)] == ["1.00 GiB", "0.50 GiB", "512.0 MiB"]


def test_the_prediction_for_a_model_on_the_cpu():
    model = attach_lora(fresh_model())
    settings = model_settings(model)
    prediction = predict(model.config, model, 4, 24, checkpointed=checkpointed(model), **settings)
    (size,) = predicted_peaks(prediction).values()
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert size > parameters
    assert predicted_peaks(None) == {}
    assert re.fullmatch(r"peak CPU    predicted \d+\.\d MiB, not measured", Watch(prediction).table().splitlines()[-1])


def test_only_gpus_that_hold_the_model_are_shown(monkeypatch):
    """A second card, or another notebook's model on it, is not this training's business."""
    monkeypatch.setattr(watch, "gpus_of", lambda model: model)
    monkeypatch.setattr(watch.torch.cuda, "max_memory_allocated", lambda index: 2**20 * (index + 1))
    for held, names in (([1], ["GPU 1"]), ([], []), ([0, 1], ["GPU 0", "GPU 1"])):
        watcher = Watch(live=False)
        watcher.on_train_begin(None, TrainerState(max_steps=1), TrainerControl(), model=held)
        watcher.on_train_end(None, TrainerState(max_steps=1), TrainerControl())
        assert list(watcher.measured) == names


def test_the_gpus_of_a_model_are_those_of_its_parameters():
    parameters = [types.SimpleNamespace(device=torch.device(place)) for place in ("cuda:1", "cpu", "cuda:0", "cuda:1")]
    assert watch.gpus_of(types.SimpleNamespace(parameters=lambda: parameters)) == [0, 1]
    assert watch.gpus_of(fresh_model()) == watch.gpus_of(None) == []
