"""A resumed run sends what it has sent before in the same bytes, and books it once."""

from __future__ import annotations

import pytest
import torch

from party.bookkeeping import Book, DataSet
from party.outbox import Outbox
from party.protect import BatchRows, Guard, Protection
from splitfl.errors import DataError
from splitfl.link import TrunkRequest
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.mechanisms import Gauss, GradientGauss

ROWS = BatchRows(dataset="ab" * 16, rows=(3, 1))
OTHERS = BatchRows(dataset="ab" * 16, rows=(3, 2))
HIDDEN = torch.linspace(-1, 1, 2 * 3 * 4).reshape(2, 3, 4)


class Echo:
    """A link that notes what comes, and gives it back."""

    def __init__(self):
        self.came = []

    def forward(self, request):
        self.came.append(bytes(request.hidden.payload.numpy()))
        return request.hidden.decode(), len(self.came)

    def backward(self, step, gradient):
        self.came.append(bytes(gradient.payload.numpy()))
        return gradient.decode()

    def release(self, *, caches=(), steps=()):
        pass


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def guard(folder, ledger, checkpoint=None):
    """As a process of a run has it."""
    protection = Protection(
        hidden=Gauss(clip=2.0, sigma=1.0), gradient=GradientGauss(clip=1.0, sigma=1.0), hidden_coding="grid16",
        gradient_coding="grid16", formal=False, because="",
    )  # fmt: skip
    data = DataSet(fingerprint=ROWS.dataset, label="rows", units=[str(number) for number in range(9)])
    made = Guard(Echo(), protection, Book(ledger=ledger, run="run", datasets={data.fingerprint: data}))
    made.outbox = Outbox(folder / "outbox", checkpoint)
    return made


def step(made, batch):
    made.batch = batch
    _, number = made.forward(TrunkRequest(hidden=HIDDEN, keep=True))
    made.backward(number, HIDDEN)


def booked(ledger):
    ledger.verify()
    return len(ledger.export()["entries"])


def test_noise_is_drawn_anew_for_each_send(tmp_path, ledger):
    made = guard(tmp_path, ledger)
    for batch in (ROWS, ROWS, OTHERS):
        step(made, batch)
    assert len(set(made.link.came)) == 6
    assert booked(ledger) == 6


def test_a_resumed_run_sends_the_same_bytes_and_goes_on(tmp_path, ledger):
    first = guard(tmp_path, ledger)
    for batch in (ROWS, OTHERS, ROWS):
        step(first, batch)
    again = guard(tmp_path, ledger)
    for batch in (ROWS, OTHERS, ROWS, ROWS):
        step(again, batch)
    assert again.link.came[:6] == first.link.came
    assert not set(again.link.came[6:]) & set(first.link.came)
    assert booked(ledger) == 8


def test_what_was_sent_before_a_checkpoint_is_not_sent_again(tmp_path, ledger):
    first = guard(tmp_path, ledger)
    step(first, ROWS)
    first.outbox.begin_at("checkpoint-4")
    step(first, ROWS)
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["checkpoint-4"]
    again = guard(tmp_path, ledger, "checkpoint-4")
    step(again, ROWS)
    assert again.link.came == first.link.came[2:]
    assert booked(ledger) == 4


def test_a_run_that_goes_on_from_elsewhere_draws_and_books(tmp_path, ledger):
    first = guard(tmp_path, ledger, "checkpoint-4")
    step(first, ROWS)
    again = guard(tmp_path, ledger, "checkpoint-2")
    step(again, ROWS)
    assert not set(again.link.came) & set(first.link.came)
    assert booked(ledger) == 4


def test_rows_that_nobody_named_are_not_kept(tmp_path, ledger):
    made = guard(tmp_path, ledger)
    step(made, None)
    assert not (tmp_path / "outbox").exists()


def test_what_is_kept_is_for_its_owner_alone_and_goes_at_the_end(tmp_path, ledger):
    made = guard(tmp_path, ledger)
    step(made, ROWS)
    assert (tmp_path / "outbox" / "start").stat().st_mode & 0o077 == 0
    made.outbox.close()
    assert not (tmp_path / "outbox").exists()


def test_a_damaged_file_is_said_not_drawn_over(tmp_path, ledger):
    step(guard(tmp_path, ledger), ROWS)
    for file in (tmp_path / "outbox").rglob("*.safetensors"):
        file.write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        step(guard(tmp_path, ledger), ROWS)
