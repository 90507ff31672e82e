"""``splitfl bench audit``: attacks on cases whose outcome is known, so that one which has grown weaker shows.

    activations    protocol `split` at several cuts of the embedded model: left-to-right decoding reads (nearly) all
    gradients      a top of the head alone: the labels follow from the gradient
    embeddings     Gaussian noise at five levels: the nearest token is right as often as the formula says

What crosses is made by the whole model in one piece, of which the split model is the exact equal: the states before the
first trunk layer and behind the last, and the gradient there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from splitfl.adapters import add_lora, lora_config, save_adapter
from splitfl.audit.attacks import attacks
from splitfl.audit.attacks.nearest import against_formula
from splitfl.audit.scoring import MAIN, Truth, score
from splitfl.audit.truth import TrueRow
from splitfl.audit.view import Knowledge, Sent, View
from splitfl.bench.utility_course import UtilityCourse
from splitfl.config import BenchSettings
from splitfl.data import load_rows, tokenise
from splitfl.demo import assets
from splitfl.kit import Kit, open_kit, write_kit
from splitfl.load import quiet_library
from splitfl.metrics import Result, write_results

CUTS = (1, 2, 4, 6)
TOP = 2
EXACT, TUNED, LABELS = 0.99, 0.95, 0.95
"""What has to be reached: K3, K1 after tuning, labels from the gradient."""
RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0)
STEPS, LEARNING_RATE = 30, 1e-3
_LONGEST = 96


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cut, one attack, one attacker."""

    attack: str
    bottom: int
    top: int
    knowledge: Knowledge
    reach: float

    @property
    def name(self) -> str:
        """For people and for ``--json``."""
        return f"{self.attack} {self.knowledge.short}, cut {self.bottom}/{self.top}"


def bench_audit(settings: BenchSettings) -> None:
    """Run the attacks, print what they read beside what they have to read, and write the figures."""
    cases = plan(settings)
    results: list[Result] = []
    rows = 3 if settings.quick else 16
    with (
        tempfile.TemporaryDirectory(prefix="splitfl-audit-") as temporary,
        UtilityCourse(len(cases) + 1, "bench audit") as course,
    ):
        course.begin()
        try:
            for cut in dict.fromkeys((case.bottom, case.top) for case in cases):
                kit, adapter, sent, truth = traffic(Path(temporary) / "-".join(map(str, cut)), cut, rows)
                for case in (each for each in cases if (each.bottom, each.top) == cut):
                    results += measure(case, kit, adapter, sent, truth)
                    course.done(case.name, f"{results[-2].value:.3f}")
                    _write(settings, results)
            results += embeddings()
            course.done("nearest, embeddings", "beside the formula")
            _write(settings, results)
        finally:
            course.close()
            print_table(results)


def plan(settings: BenchSettings) -> list[Case]:
    """Every case; with ``--quick`` one cut."""
    found = [
        Case(attack="map_decode", bottom=bottom, top=TOP, knowledge=knowledge, reach=reach)
        for bottom in (CUTS[1:2] if settings.quick else CUTS)
        for knowledge, reach in ((Knowledge.EXACT, EXACT), (Knowledge.BASE, TUNED))
    ]
    return [*found, Case(attack="grad-decode", bottom=2, top=0, knowledge=Knowledge.BASE, reach=LABELS)]


def traffic(folder: Path, cut: tuple[int, int], rows: int) -> tuple[Kit, Path, tuple[Sent, ...], tuple[TrueRow, ...]]:
    """What `split` sends of some rows once the adapter has been tuned on them for a while.

    Returns:
        The kit, the tuned adapter, what crossed, and the truth.
    """
    model_dir = assets() / "model"
    write_kit(model_dir, folder / "kit", bottom=cut[0], top=cut[1], dtype="float32")
    kit = open_kit(folder / "kit")
    examples = _examples(kit, rows)
    with quiet_library():
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    model = add_lora(base, lora_config(base, kit.plan, target_modules=["all-linear"]), seed=0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(STEPS):
        optimiser.zero_grad()
        model(**examples[step % len(examples)], use_cache=False).loss.backward()
        optimiser.step()
    save_adapter(model, folder / "adapter", base_name="embedded")
    model.eval()
    sent = tuple(_sent(model, kit, number, example) for number, example in enumerate(examples))
    return kit, folder / "adapter", sent, tuple(_told(kit, examples))


def _examples(kit: Kit, rows: int) -> list[dict[str, torch.Tensor]]:
    found = tokenise(
        load_rows(assets() / "data" / "hospital.train.jsonl", task="causal-lm"), kit.tokenizer(), max_length=_LONGEST,
        truncation="right",
    )  # fmt: skip
    return [{name: torch.tensor([each[name]]) for name in ("input_ids", "labels")} for each in list(found)[:rows]]


def _sent(model: Any, kit: Kit, number: int, example: dict[str, torch.Tensor]) -> Sent:
    result = model(**example, use_cache=False, output_hidden_states=True)
    below, above = result.hidden_states[kit.plan.bottom], _behind_trunk(model, kit, example)
    (gradient,) = torch.autograd.grad(above[1], above[0])
    return Sent(
        number=number, step=number, place=0, training=True, hidden=below[0].detach(), output=above[0][0].detach(),
        gradient=gradient[0],
    )  # fmt: skip


def _behind_trunk(model: Any, kit: Kit, example: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """State at the upper cut [1, T, D], and the loss that hangs on it.

    A hook takes it: in the library's own list of states the last one is behind the final norm.
    """
    kept: list[torch.Tensor] = []

    def keep(_layer: Any, _args: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_(True)
        kept.append(state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    layers = model.get_base_model().base_model.get_submodule(kit.plan.stack)
    hook = layers[kit.plan.trunk_layers.stop - 1].register_forward_hook(keep)
    try:
        loss = model(**example, use_cache=False).loss
    finally:
        hook.remove()
    return kept[0], loss


def _told(kit: Kit, examples: Sequence[dict[str, torch.Tensor]]) -> Iterator[TrueRow]:
    special = torch.tensor(kit.tokenizer().all_special_ids)
    for number, example in enumerate(examples):
        ids = example["input_ids"][0]
        yield TrueRow(
            number=number, dataset="train", row=number, ids=ids, labels=example["labels"][0],
            special=torch.isin(ids, special),
        )  # fmt: skip


def measure(case: Case, kit: Kit, adapter: Path, sent: tuple[Sent, ...], truth: tuple[TrueRow, ...]) -> list[Result]:
    """What the attack gets, and how long it takes."""
    attack = attacks()[case.attack]
    view = View(
        kit=kit, knowledge=case.knowledge, sent=sent, adapter=adapter if case.knowledge == Knowledge.EXACT else None
    )
    started = time.monotonic()
    guesses = attack.run(view)
    seconds = time.monotonic() - started
    figure = score(guesses, Truth(rows=truth), attack.finds)[MAIN[attack.finds]]
    return [
        Result(case=case.name, metric=MAIN[attack.finds], value=figure.value, unit="share", reach=case.reach),
        Result(case=case.name, metric="time a row", value=seconds / len(sent), unit="s"),
    ]


def embeddings() -> list[Result]:
    """The nearest token at five noise levels on a table of norm 1 at right angles, beside the formula."""
    table = torch.nn.functional.normalize(torch.randn(4096, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    return [
        Result(case=f"nearest, r/sigma {level.ratio:g}", metric="token recovery", value=level.found, unit="share",
               reference=level.formula)
        for level in against_formula(table, RATIOS)
    ]  # fmt: skip


def _write(settings: BenchSettings, results: Sequence[Result]) -> None:
    if settings.json is not None:
        write_results(settings.json, "bench", settings, results)


def print_table(results: Sequence[Result]) -> None:
    """Every figure beside what it has to reach, or the formula's."""
    table = Table(box=None)
    for head in ("case", "metric", "found", "to reach", "formula", ""):
        table.add_column(head)
    for each in results:
        if each.unit != "share" or not isinstance(each.value, float):
            continue
        verdict = "" if each.reach is None else "met" if each.value >= each.reach else "missed"
        beside = ["" if n is None else f"{n:.3f}" for n in (each.reach, each.reference)]
        table.add_row(each.case, each.metric, f"{each.value:.3f}", *beside, verdict)
    Console().print(table)
