"""`--adapter` of `evaluate` and `generate`: an adapter from elsewhere, checked as by an owner, in a run's split."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from party.remote import put_remote_trunk
from splitfl.adapter_check import check_adapter, plug_in
from splitfl.adapters import ADAPTER_FILE, adapter_digest, add_lora, lora_config, save_adapter
from splitfl.data import Collator
from splitfl.kit import open_kit
from splitfl.privacy.ledger import Ledger
from tests.live.child import splitfl_here
from tests.live.models import whole_model
from tests.live.pairs import examples_of
from tests.live.runs import adapter_in, loss_row_by_row

pytestmark = pytest.mark.slow


def made(kit_dir, folder, *, seed, **lora):
    """An adapter as another party's training leaves one: every tuned value moved."""
    kit = open_kit(kit_dir)
    base = kit.load()
    model = add_lora(base, lora_config(base, kit.plan, **lora), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    save_adapter(model, folder, base_name="somewhere")
    return folder


@pytest.fixture(scope="module")
def plugged(tiny_llama, tmp_path_factory):
    """What `splitfl plugin` wrote of two parties' adapters, and its figures."""
    folder = tmp_path_factory.mktemp("plugged")
    words = ["--model", tiny_llama[0], "--kit", tiny_llama[1], "--out", folder / "mean", "--json", folder / "out.json"]
    for seed in (1, 2):
        words += ["--adapter", made(tiny_llama[1], folder / str(seed), seed=seed, r=3, target_modules=["all-linear"])]
    splitfl_here("plugin", *words)
    return folder / "mean"


def refused(capsys, *words, code=4):
    splitfl_here(*words, code=code)
    return " ".join(capsys.readouterr().err.split())


def full_model(tiny_llama, adapter):
    kit = open_kit(tiny_llama[1])
    return plug_in(whole_model(tiny_llama[0]), check_adapter(adapter, kit), kit.plan)


def test_what_plugin_wrote_scores_through_the_split_as_in_the_full_model(
    finished, owner, tiny_llama, plugged, rows, tmp_path, capsys
):
    words = ["evaluate", "--run", finished, "--eval", rows.held_out, "--json", tmp_path / "out.json"]
    splitfl_here(*words, "--adapter", plugged)
    assert "digest" in capsys.readouterr().err
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {each["case"] for each in results} == {"with --adapter"}
    loss = next(each["value"] for each in results if each["metric"] == "loss")
    wanted = loss_row_by_row(full_model(tiny_llama, plugged), tiny_llama[1], rows.held_out)
    assert loss == pytest.approx(wanted, abs=1e-5)
    splitfl_here(*words)
    own = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {each["case"] for each in own} == {"tuned"}
    assert abs(next(each["value"] for each in own if each["metric"] == "loss") - loss) > 1e-2


def test_another_partys_adapter_writes_the_full_models_words(finished, owner, tiny_llama, plugged, tmp_path, capsys):
    kit = open_kit(tiny_llama[1])
    tokenizer = kit.tokenizer()
    splitfl_here("generate", "--run", finished, "--prompt", "Agnes sang", "--max-new-tokens", "12", "--adapter",
                 plugged, "--json", tmp_path / "text.json")  # fmt: skip
    text = json.loads((tmp_path / "text.json").read_text())["results"][0]["value"]
    ids = tokenizer("Agnes sang")["input_ids"]
    ids = torch.tensor([ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids])
    model = full_model(tiny_llama, plugged)
    with torch.no_grad():
        for _ in range(12):  # greedy, without any cache
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
    assert tokenizer.decode(ids[0], skip_special_tokens=True).endswith(text)
    assert len(text) > 3


def test_what_no_kit_made_is_refused_before_the_owner_is_asked(finished, plugged, rows, tmp_path, capsys):
    """The address leads nowhere, and the answer is still about the adapter."""
    nowhere = ["evaluate", "--run", finished, "--eval", rows.held_out, "--owner", "tcp://127.0.0.1:9", "--timeout", "1"]
    bad = shutil.copytree(plugged, tmp_path / "bad")
    tensors = load_file(bad / ADAPTER_FILE)
    first = next(name for name in sorted(tensors) if "lora_B" in name)
    save_file({**tensors, first: tensors[first] * float("nan")}, bad / ADAPTER_FILE)
    assert "not finite" in refused(capsys, *nowhere, "--adapter", bad)
    save_file({**tensors, "more": torch.zeros(1)}, bad / ADAPTER_FILE)
    assert "1 extra (more)" in refused(capsys, *nowhere, "--adapter", bad)
    save_file({**tensors, first: tensors[first] * 1e4}, bad / ADAPTER_FILE)
    assert "--max-norm" in refused(capsys, *nowhere, "--adapter", bad)
    (bad / ADAPTER_FILE).unlink()
    torch.save(tensors, bad / "adapter_model.bin")
    assert "a pickled adapter, which is not read" in refused(capsys, *nowhere, "--adapter", bad)
    assert "holds no adapter_config.json" in refused(capsys, *nowhere, "--adapter", tmp_path / "none")
    assert "no effect without --adapter" in refused(capsys, *nowhere, "--max-norm", 3, code=2)
    assert "leave --adapter out" in refused(capsys, *nowhere, "--adapter", plugged, "--split", "base", code=2)


def test_a_larger_change_is_taken_if_that_is_asked_for(finished, owner, tiny_llama, tmp_path, rows, capsys):
    large = made(tiny_llama[1], tmp_path / "large", seed=4, r=8, lora_alpha=800)
    words = ["evaluate", "--run", finished, "--eval", rows.held_out, "--adapter", large]
    assert "--max-norm" in refused(capsys, *words)
    splitfl_here(*words, "--max-norm", 1e6)


def test_the_owner_reads_the_digest_that_the_ledger_booked(tiny_llama, rows, tmp_path, capsys):
    kit_dir, out = tiny_llama[1], tmp_path / "run"
    make = ["emulator", tmp_path / "emulator", "--model", tiny_llama[0], "--kit", kit_dir, "--keep", 1]
    splitfl_here(*make)
    splitfl_here("tune", "--protocol", "guarded-offline", "--kit", kit_dir, "--emulator", tmp_path / "emulator",
                 "--train", rows.train, "--out", out, "--max-steps", 2, "--learning-rate", 1e-2, "--ledger",
                 tmp_path / "ledger.sqlite")  # fmt: skip
    with Ledger(tmp_path / "ledger.sqlite", create=False) as ledger:
        [entry] = ledger.export(units=True)["entries"]
    capsys.readouterr()
    splitfl_here("plugin", "--model", tiny_llama[0], "--kit", kit_dir, "--adapter", out / "adapter")
    digest = adapter_digest(adapter_in(out))
    assert f"digest   {digest}\n" in capsys.readouterr().out
    found = []
    for more in ((), ("--adapter", out / "adapter")):  # with the emulator, too
        splitfl_here("evaluate", "--run", out, "--eval", rows.held_out, "--json", tmp_path / "out.json", *more)
        found.append(json.loads((tmp_path / "out.json").read_text())["results"])
    assert [each["value"] for each in found[0][:-1]] == [each["value"] for each in found[1][:-1]]
    assert found[1][0]["case"] == "with --adapter with the emulator"
    assert entry["release_id"].startswith("adapter:")
    assert entry["release_id"].endswith(f":{digest}")


def test_a_live_session_gives_the_very_pairs_that_the_owner_measures_with(owner, tiny_llama, rows):
    """What `splitfl margin` calls a query is what a session answers."""
    from model_owner.plugin import load_full
    from model_owner.student import Pair

    kit = open_kit(tiny_llama[1])
    examples, _ = examples_of(kit, rows)
    batch = Collator(kit.tokenizer(), pad_token_id=kit.config.pad_token_id)(examples[:6])
    del batch["labels"]
    model, _ = load_full(tiny_llama[0], kit)
    pair, given = Pair(model, kit.plan, {}), {}
    pair.full[kit.plan.bottom].register_forward_pre_hook(lambda _, args: given.update(owner=args[0]))
    answers = pair.full_output(batch)
    party = kit.load().eval()
    with owner.session() as session, torch.no_grad():
        remote = put_remote_trunk(party, kit.plan, session)
        remote.register_forward_hook(lambda _, args, output: given.update(
            party=args[0], answer=output[0] if isinstance(output, tuple) else output))  # fmt: skip
        party(**batch)
    counted = batch["attention_mask"].bool()
    assert not bool(counted.all()), "some rows are padded"
    assert (given["party"] - given["owner"])[counted].abs().max() < 1e-6
    assert (given["answer"] - answers)[counted].abs().max() < 1e-6
