"""The progress bar: on a terminal only, and never in the way of what is printed."""

import io
from contextlib import redirect_stderr

import pytest
import torch

from tersor.training import TorchEvaluator
from tersor.training.progress import TrainingProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def run(stream, *, shown):
    with redirect_stderr(stream), TrainingProgress(4, shown=shown) as progress:
        for step in range(4):
            print(f"line {step}")
            progress.advance(torch.tensor(0.25))
    return stream.getvalue()


def test_step_and_loss_are_shown_on_a_terminal(terminal, capsys):
    shown = run(terminal, shown=True)
    assert "4/4" in shown
    assert "loss 0.25" in shown
    # The standard output is no terminal here, so every line stays in it.
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\nline 3\n"


def test_it_can_be_turned_off(terminal):
    assert run(terminal, shown=False) == ""


def test_nothing_is_written_where_there_is_no_terminal():
    assert run(io.StringIO(), shown=True) == ""


@pytest.mark.parametrize("progress", [True, False])
def test_a_training_shows_it_unless_told_not_to(terminal, progress):
    model = torch.nn.Linear(2, 1)
    batches = [(torch.ones(1, 2), torch.ones(1, 1))] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.mse_loss
    with redirect_stderr(terminal):
        TorchEvaluator.from_loader(batches, loss, optimizer, progress=progress).train(model, max_epochs=2)
    assert ("6/6" in terminal.getvalue()) == progress
