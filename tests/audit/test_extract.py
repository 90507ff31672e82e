"""What a holder learns of the trunk from recorded traffic: the more tokens the more; from other rows, nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_owner.trunk import LocalLink, Trunk
from splitfl.audit.attacks.extract import Recorded, Settings, Student, extraction_curve, train_student
from splitfl.audit.bottom import Bottom
from splitfl.audit.top import Top
from splitfl.audit.view import Sent
from splitfl.errors import UsageError
from splitfl.kit import open_kit, write_kit
from splitfl.link import TrunkRequest
from splitfl.load import load_trunk_side
from tests.families import VOCAB, save_model

LENGTH = 16
QUICK = Settings(steps=300, rate=3e-3, batch=16)


def kit_in(folder):
    save_model("llama", folder / "model")
    write_kit(folder / "model", folder / "kit", bottom=2, top=2, dtype="float32")
    return open_kit(folder / "kit")


def traffic_of(kit):
    """160 rows and 40 held out, with gradients: what a holder kept. Labels are what the real model says next."""
    trunk = Trunk(load_trunk_side(kit.path.parent / "model", kit.plan, dtype=torch.float32), kit.plan)
    link, bottom = LocalLink(trunk), Bottom(kit.load(torch.float32), kit.plan.stack, kit.plan.bottom)
    top = Top(kit.load(torch.float32), kit.plan)
    ids = torch.randint(3, VOCAB, (200, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = bottom(ids)
    output, step = link.forward(TrunkRequest(hidden=hidden, keep=True))
    reached = output.clone().requires_grad_(True)
    logits = top(reached)
    labels = torch.cat([ids[:, :1], logits[:, :-1].argmax(-1)], dim=1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, reached)
    returned = link.backward(step, gradient)
    return [
        Recorded(
            sent=Sent(
                number=at, step=1, place=at, training=True, hidden=hidden[at], output=output[at],
                gradient=gradient[at], returned=returned[at],
            ),
            labels=labels[at],
        )
        for at in range(200)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return kit_in(tmp_path_factory.mktemp("extract"))


@pytest.fixture(scope="module")
def traffic(kit):
    return traffic_of(kit)


@pytest.mark.slow
def test_more_traffic_gives_a_better_student(kit, traffic):
    few, many = extraction_curve(kit, traffic[:160], traffic[160:], [4 * LENGTH, 160 * LENGTH, 3], QUICK)
    assert (few.tokens, many.tokens) == (4 * LENGTH, 160 * LENGTH)
    assert many.true.error == 0
    assert many.true.agreement == 1
    assert many.student.error < min(few.student.error, many.skipped.error)
    assert many.student.loss < few.student.loss
    assert many.student.agreement > many.skipped.agreement + 0.05
    assert many.recovered > 0.3, many
    assert few.recovered < many.recovered / 2, "a few rows are learnt by heart and teach no trunk"


@pytest.mark.slow
def test_without_derivatives_and_from_shuffled_pairs(kit, traffic):
    """The controls: outputs alone teach less here, and those of other rows teach nothing."""
    held = traffic[160:]
    plain = dataclasses.replace(QUICK, derivatives=0.0)
    (outputs_alone,) = extraction_curve(kit, traffic[:160], held, [160 * LENGTH], plain)
    assert outputs_alone.student.error < outputs_alone.skipped.error
    others = [
        dataclasses.replace(row, sent=dataclasses.replace(row.sent, output=other.sent.output))
        for row, other in zip(traffic[:160], [*traffic[1:160], traffic[0]], strict=True)
    ]
    (confused,) = extraction_curve(kit, others, held, [160 * LENGTH], plain)
    assert confused.student.agreement < outputs_alone.student.agreement
    assert confused.student.error > 2 * outputs_alone.student.error


def test_a_student_with_the_trunk_s_weights_is_the_trunk(kit, traffic):
    """Entering and leaving are right: with the real layers in its places it gives the recorded outputs."""
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(kit.path.parent / "model", dtype=torch.float32)
    student = Student(kit)
    for index in kit.plan.trunk_layers:
        student.model.model.layers[index].load_state_dict(real.model.layers[index].state_dict())
    hidden = torch.stack([row.sent.hidden for row in traffic[:3]])
    wanted = torch.stack([row.sent.output for row in traffic[:3]])
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    assert (student(hidden, mask) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    mask[1:, 10:] = 0
    assert (student(hidden, mask)[1:, :10] - wanted[1:, :10]).abs().max() < 1e-4 * wanted.abs().max()


def test_traffic_without_outputs_is_refused(kit, traffic):
    bare = dataclasses.replace(traffic[0], sent=dataclasses.replace(traffic[0].sent, output=None))
    for rows in ([], [bare]):
        with pytest.raises(UsageError, match="output was kept"):
            train_student(kit, rows)
