"""`--record` on both sides of real runs: what is read again is what the session sent, and whose rows it was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file

from party.recorded import forget, open_recorded
from party.rundir import RunDirectory
from party.session import Session
from party.tune import read_data
from splitfl.aggregation.state import State
from splitfl.audit.bottom import open_bottom
from splitfl.audit.view import Knowledge, View
from splitfl.demo import assets
from splitfl.errors import DataError, KeyFileError, UsageError
from splitfl.kit import open_kit, write_kit
from splitfl.link import decoded
from tests.federation.federation import coordinate, make_keys
from tests.live.child import splitfl, splitfl_here
from tests.live.models import answer_rows, make_kit, save_tiny, write_jsonl
from tests.live.owner import serve
from tests.live.runs import events

pytestmark = pytest.mark.slow
TRAIN, HELD, BATCH = 6, 3, 2
COMMON = ("--per-device-train-batch-size", BATCH, "--per-device-eval-batch-size", BATCH, "--max-length", 40,
          "--truncation", "right", "--target-modules", "all-linear", "--learning-rate", "5e-3", "--threads", 1,
          "--logging-steps", 1, "--seed", 3)  # fmt: skip


@dataclass
class Watched:
    """What sessions were given and gave, by session and step."""

    hidden: dict = field(default_factory=dict)
    mask: dict = field(default_factory=dict)
    output: dict = field(default_factory=dict)
    gradient: dict = field(default_factory=dict)
    returned: dict = field(default_factory=dict)


@pytest.fixture(scope="module")
def watched():
    """Every session of this process, looked at where it is called: nothing of the recording is involved."""
    seen, forward, backward = Watched(), Session.forward, Session.backward

    def noted_forward(self, request):
        hidden = decoded(request.hidden).detach().clone()
        output, step = forward(self, request)
        key = self.terms.session, step
        seen.hidden[key], seen.mask[key], seen.output[key] = hidden, request.mask, output.detach().clone()
        return output, step

    def noted_backward(self, step, gradient):
        key = self.terms.session, step
        seen.gradient[key] = decoded(gradient).detach().clone()
        seen.returned[key] = result = backward(self, step, gradient)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "forward", noted_forward)
        patch.setattr(Session, "backward", noted_backward)
        yield seen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An owner of the embedded model that records, and rows."""
    folder = tmp_path_factory.mktemp("recorded")
    write_kit(assets() / "model", folder / "kit", bottom=2, top=2, dtype="float32")
    for name, count in (("train", TRAIN), ("held", HELD)):
        lines = (assets() / "data" / f"hospital.{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    with serve(assets() / "model", folder / "kit", folder, options=("--record", folder / "owner")) as owner:
        yield folder, owner


def tune(place, out, *more):
    folder, owner = place
    rows = ("--train", folder / "train.jsonl", "--eval", folder / "held.jsonl")
    splitfl_here("tune", *owner.link(), *rows, *COMMON, "--out", out, "--ledger", folder / "ledger", "--record", *more)
    return RunDirectory(out)


@pytest.fixture(scope="module")
def split_run(place, watched):
    """Three steps with checks of the owner; then, resumed, two more. Its training is checked after each step."""
    out = place[0] / "split"
    words = ("--protocol", "split", "--save-steps", 2, "--eval-steps", 2, "--probe-every", 2)
    tune(place, out, *words, "--max-steps", 3)
    return tune(place, out, *words, "--max-steps", 5, "--resume")


@pytest.fixture(scope="module")
def noisy_run(place, watched):
    """Each row sent once, with noise, all of one length."""
    noise = ("--noise", "gauss", "--clip", 40, "--sigma", "0.5", "--hide-lengths")
    more = ("--protocol", "guarded-gradfree", "--max-steps", 2, *noise)
    return tune(place, place[0] / "noisy", *more)


@pytest.fixture(scope="module")
def kit(place):
    return open_kit(place[0] / "kit")


@pytest.fixture(scope="module")
def recorded(split_run, kit):
    return open_recorded(split_run, kit)


@pytest.fixture(scope="module")
def noisy(noisy_run, kit):
    return open_recorded(noisy_run, kit)


def requests_of(found, seen):
    """For each `Sent`, the request that it was part of: the one of that step whose row it is, bit for bit."""
    for sent in found.sent:
        [key] = [
            key
            for key, hidden in seen.hidden.items()
            if key[1] == sent.step
            and sent.place < len(hidden)
            and torch.equal(cut(hidden, seen, key, sent), sent.hidden)
        ]
        yield sent, key


def cut(values, seen, key, sent):
    mask = seen.mask[key]
    row = values[sent.place]
    return row if mask is None else row[mask[sent.place].bool()]


def test_what_is_read_again_is_what_the_session_sent(recorded, watched):
    trained = 0
    for sent, key in requests_of(recorded, watched):
        assert torch.equal(sent.output, cut(watched.output[key], watched, key, sent))
        assert sent.training == (key in watched.gradient)
        if sent.training:
            trained += 1
            assert torch.equal(sent.gradient, cut(watched.gradient[key], watched, key, sent))
            assert torch.equal(sent.returned, cut(watched.returned[key], watched, key, sent))
    assert trained == 5 * BATCH


def test_every_row_has_its_truth(recorded, split_run, kit):
    data = read_data(split_run.settings(), kit)
    assert set(recorded.truth) == {sent.number for sent in recorded.sent}
    for sent in recorded.sent:
        true = recorded.truth[sent.number]
        assert true.dataset == ("train" if sent.training else "held-out")
        example = (data.train if sent.training else data.held_out)[true.row]
        assert true.ids.tolist() == example["input_ids"]
        assert true.labels.tolist() == example["labels"]
        assert len(true.ids) == len(sent.hidden)
    trained = [recorded.truth[sent.number].row for sent in recorded.sent if sent.training]
    assert sorted(trained[: 3 * BATCH]) == list(range(TRAIN)), "one epoch holds each row once"
    before = [recorded.truth[number].row for number in range(HELD)]
    assert sorted(before) == list(range(HELD))


def test_the_truth_is_that_of_the_bottom_itself(recorded, kit, watched):
    """Independent of any bookkeeping: the kit's bottom gives what crossed when it is given the true tokens."""
    view = View(kit=kit, knowledge=Knowledge.EXACT)
    with torch.no_grad():
        for sent in recorded.sent[:HELD]:
            ids = recorded.truth[sent.number].ids[None]
            assert torch.allclose(open_bottom(view)(ids)[0], sent.hidden, atol=1e-4)


def test_the_adapter_that_a_row_crossed_with_is_known_where_it_was_kept(recorded, split_run, kit):
    groups = recorded.by_adapter()
    assert split_run.adapter in groups
    assert None in groups
    assert groups[None][:HELD] == tuple(range(HELD)), "before training the bottom is the owner's own"
    final = groups[split_run.adapter]
    assert all(not recorded.sent[number].training for number in final), "what comes after the last step is held out"
    with torch.no_grad():
        for folder, numbers in groups.items():
            bottom = open_bottom(View(kit=kit, knowledge=Knowledge.EXACT, adapter=folder))
            for number in numbers:
                ids = recorded.truth[number].ids[None]
                assert torch.allclose(bottom(ids)[0], recorded.sent[number].hidden, atol=1e-4), (folder, number)
    states = [recorded.adapter_at(sent.number) for sent in recorded.sent if sent.training]
    assert [state.weights for state in states] == [step for step in range(5) for _ in range(BATCH)]
    assert not recorded.adapter_at(10**6).known


def test_probes_are_counted_and_are_no_rows(recorded, split_run, watched):
    assert recorded.counts.probes > 0
    probes = [record for record in events(split_run.path, "probe") if record["check"] == "gradient"]
    assert probes
    assert recorded.counts.rows == len(recorded.sent) == 5 * BATCH + HELD * evaluations(split_run)


def evaluations(run):
    return len({record["step"] for record in events(run.path, "eval")})  # the same weights are not scored twice


def test_counts_are_those_of_the_log(recorded, split_run):
    assert recorded.counts.segments == 2
    assert (recorded.counts.broken_off, recorded.counts.retries, recorded.counts.full) == (0, 0, False)
    # The last records of bytes come before the goodbyes.
    told = [record["bytes_sent"] for record in events(split_run.path, "end")]
    assert 0 <= recorded.counts.bytes_sent - sum(told) < 1000


def test_both_sides_recorded_the_same(recorded, split_run, kit, place):
    folder, _ = place
    files = sorted((folder / "owner").glob("*-hospital*.traffic"), key=lambda path: path.stat().st_mtime_ns)
    first, second = (
        open_recorded(split_run, kit, owner_recording=path, owner_key=folder / "keys" / "owner.key_secret")
        for path in files[:2]
    )
    both = [*first.sent, *second.sent]
    assert len(both) == len(recorded.sent)
    for theirs, ours in zip(both, recorded.sent, strict=True):
        assert (theirs.step, theirs.place) == (ours.step, ours.place)
        for name in ("hidden", "output", "gradient", "returned"):
            one, other = getattr(theirs, name), getattr(ours, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    for name in ("messages_sent", "messages_received", "bytes_sent", "bytes_received", "probes"):
        assert getattr(first.counts, name) + getattr(second.counts, name) == getattr(recorded.counts, name)
    for number, true in first.truth.items():
        assert torch.equal(true.ids, recorded.truth[number].ids)


def test_the_knowledge_of_a_seed_is_that_of_the_run(recorded):
    assert recorded.lora is not None
    assert recorded.lora["seed"] == 3
    assert recorded.lora["target_modules"] == ["all-linear"]
    assert recorded.lora["top_alone"] is False
    assert recorded.noise.name == recorded.gradient_noise.name == "none"


# ---- with noise, each row once, lengths hidden


def test_with_noise_the_truth_marks_what_is_padding(noisy, noisy_run, kit, watched):
    data = read_data(noisy_run.settings(), kit)
    assert len(noisy.sent) == len(noisy.truth) == TRAIN + HELD
    for sent, _ in requests_of(noisy, watched):
        true = noisy.truth[sent.number]
        example = (data.train if true.dataset == "train" else data.held_out)[true.row]
        length = len(example["input_ids"])
        assert len(true.ids) == len(true.special) == len(sent.hidden) == 40
        assert true.ids[:length].tolist() == example["input_ids"]
        assert true.special[length:].all()
        assert (true.labels[length:] == -100).all()
    assert {true.dataset for true in noisy.truth.values()} == {"train", "held-out"}
    assert noisy.noise.name == "gauss"
    assert (noisy.noise.sigma, noisy.noise.clip, noisy.noise.unit) == (pytest.approx(0.5), 40.0, "record")
    assert noisy.by_adapter() == {None: tuple(range(TRAIN + HELD))}, "this bottom is never trained"


def test_noise_is_what_stands_between_truth_and_what_crossed(noisy, kit):
    bottom = open_bottom(View(kit=kit, knowledge=Knowledge.EXACT))
    with torch.no_grad():
        clean = torch.stack([bottom(noisy.truth[sent.number].ids[None])[0] for sent in noisy.sent])
    real = torch.stack([~noisy.truth[sent.number].special for sent in noisy.sent])
    norms = [float(row.norm()) for row in clean]
    clean *= torch.tensor([min(1.0, 40.0 / norm) for norm in norms])[:, None, None]
    noise = (torch.stack([sent.hidden for sent in noisy.sent]) - clean)[real]
    assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
    assert abs(float(noise.mean())) < 0.02


# ---- refused, and forgotten


def test_rows_that_have_changed_are_refused(recorded, split_run, kit, place):
    path = place[0] / "train.jsonl"
    before = path.read_text(encoding="utf-8")
    try:
        lines = before.splitlines(keepends=True)
        for changed in (lines[::-1], lines[:-1], [lines[0].replace('"prompt": "', '"prompt": "Oh! '), *lines[1:]]):
            path.write_text("".join(changed), encoding="utf-8")
            with pytest.raises(DataError, match="does not hold the rows"):
                open_recorded(split_run, kit)
    finally:
        path.write_text(before, encoding="utf-8")


def test_another_key_does_not_open_it(recorded, split_run, kit, place):
    with pytest.raises(KeyFileError):
        open_recorded(split_run, kit, key=place[0] / "keys" / "clinic.key_secret")


def test_only_what_is_asked_for_is_decoded(recorded, split_run, kit):
    found = open_recorded(split_run, kit, numbers=(1, 4))
    assert [sent.number for sent in found.sent] == [1, 4]
    assert torch.equal(found.sent[1].hidden, recorded.sent[4].hidden)
    assert found.counts == recorded.counts
    assert set(found.truth) == set(recorded.truth)


def test_a_forgotten_recording_is_gone(noisy, noisy_run, kit, tmp_path):
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(noisy_run.path, copy.path)
    kept = (copy.recording / "000001.traffic").read_bytes()
    assert forget(copy) > len(kept)
    assert not copy.recording.exists()
    assert forget(copy) == 0
    with pytest.raises(UsageError, match="no recording"):
        open_recorded(copy, kit)
    copy.recording.mkdir()
    (copy.recording / "000001.traffic").write_bytes(kept)
    with pytest.raises(UsageError, match="destroyed"):
        open_recorded(copy, kit)


def test_a_small_limit_stops_the_recording_and_not_the_run(place, kit, watched, capsys):
    run = tune(place, place[0] / "small", "--protocol", "split", "--max-steps", 2, "--record-limit", "300kB")
    assert capsys.readouterr().err.count("recording stopped") == 1
    assert [record["steps"] for record in events(run.path, "end")] == [2]
    assert sum(path.stat().st_size for path in run.recording.iterdir()) <= 300_000
    found = open_recorded(run, kit)
    assert found.counts.full
    assert found.counts.broken_off == 0
    assert 0 < len(found.sent) == len(found.truth)


# ---- updates


def test_updates_that_left_in_the_clear_are_kept(tmp_path):
    """One party alone: the next round begins with what it sent, bit for bit."""
    model = save_tiny("llama", tmp_path / "model")
    kit_dir = make_kit(model, tmp_path / "kit")
    rows = write_jsonl(tmp_path / "rows.jsonl", answer_rows()[:12])
    make_keys(tmp_path)
    words = ("--protocol", "fed-params", "--model", model, "--kit", kit_dir, "--train", rows, "--sum", "plain",
             "--local-steps", 2, "--target-modules", "all-linear", "--record", "--learning-rate", "5e-3")  # fmt: skip
    options = ("--sum", "plain", "--min-parties", 1, "--rounds", 2, "--wait", "0.2")
    with coordinate(tmp_path, *options) as federation:
        _, _, *command = federation.words("hospital", tmp_path / "run", *words)
        splitfl(*command, folder=tmp_path)
        assert federation.running.wait() == 0
    run = RunDirectory(tmp_path / "run")
    first, second = open_recorded(run, open_kit(kit_dir)).updates
    assert (first.round, second.round) == (0, 1)
    assert not any(tensor.any() for name, tensor in first.before.items() if "lora_B" in name)
    assert any(not torch.equal(first.before[name], first.after[name]) for name in first.before)
    assert all(torch.equal(first.after[name], second.before[name]) for name in first.after)
    own = State.from_bytes((run.path / "federation" / "own.safetensors").read_bytes()).adapter
    prefix = "base_model.model."
    for name, pair in own.pairs.items():
        for letter, trained in (("A", pair.a), ("B", pair.b)):
            assert torch.equal(second.after[f"{prefix}{name}.lora_{letter}.weight"], trained)
    assert second.after.keys() == load_file(run.adapter / "adapter_model.safetensors").keys()
