"""`splitfl plugin` as an owner runs it: what it plugs in is exact, and what no kit made is refused untouched."""

from __future__ import annotations

import json
import math
import shutil
import struct

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from model_owner.adapter_check import CONFIG_FILE, LARGEST_CONFIG, check_adapter, fresh, measured_change
from model_owner.plugin import combined, kit_of, load_full, plug_in
from model_owner.trunk import LocalLink, Trunk
from party.evaluate import evaluate
from party.model import open_model
from splitfl.adapters import ADAPTER_FILE, add_lora, lora_config, open_adapter, save_adapter
from splitfl.cli import main
from splitfl.data import Collator, load_rows, tokenise
from splitfl.errors import ModelError
from splitfl.kit import open_kit
from splitfl.load import load_trunk_side
from tests.live.child import splitfl_here
from tests.live.models import answer_rows, make_kit, save_tiny, sentences, tokenizer_of, whole_model, write_jsonl
from tests.live.owner import serve

pytestmark = pytest.mark.slow  # a second a test: together too long for every save

KINDS = {
    "llama": ("llama", {}),
    "llama, all": ("llama", {"target_modules": ["all-linear"], "use_rslora": True}),
    "llama, dora": ("llama", {"use_dora": True, "use_rslora": True}),
    "gpt2, biases": ("gpt2", {"target_modules": ["all-linear"], "bias": "lora_only"}),
    "gpt2, dora": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "bert": ("bert", {"bias": "lora_only"}),
}


def task_of(family):
    return "sequence-classification" if family == "bert" else "causal-lm"


@pytest.fixture(scope="module")
def llama(place):
    return open_kit(place / "llama.kit")


@pytest.fixture(scope="module")
def sound(place):
    """An adapter to be copied and spoilt."""
    return made(place, place.parent / f"{place.name}-sound")


@pytest.fixture
def adapter(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "a")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, their kits and rows."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "gpt2", "bert"):
        save_tiny(family, folder / family)
        make_kit(folder / family, folder / f"{family}.kit", task=task_of(family))
    write_jsonl(folder / "held.jsonl", answer_rows()[:10])
    write_jsonl(folder / "labelled.jsonl", [{"text": text, "label": label} for text, label in sentences()[:10]])
    return folder


def made(place, out, family="llama", *, r=4, seed=1, size=0.1, layers=None, **lora):
    """An adapter as a holder's training leaves one: every tuned value moved; `size` 0 leaves it untouched."""
    kit = open_kit(place / f"{family}.kit")
    base = kit.load()
    config = lora_config(base, kit.plan, r=r, **lora)
    if layers is not None:
        config.layers_to_transform = layers
    model = add_lora(base, config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and size:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    save_adapter(model, out, base_name="full")
    return out


def kind(place, name, out, **changes):
    family, lora = KINDS[name]
    return family, made(place, out, family, **{**lora, **changes})


def ids(model):
    tokens = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits


def run(*words, code=0):
    with pytest.raises(SystemExit) as stop:
        main(["plugin", *map(str, words), "--threads", "1"])
    assert stop.value.code == code


def base_words(place, family="llama"):
    return ["--model", place / family, "--kit", place / f"{family}.kit"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(place, adapter, tmp_path, capsys, *words, code=4):
    """The error of a plug-in that must leave everything as it was."""
    before = contents(place), contents(adapter) if adapter.is_dir() else None
    run(*base_words(place), "--adapter", adapter, "--out", tmp_path / "out", "--json", tmp_path / "out.json", *words,
        code=code)  # fmt: skip
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.json").exists()
    assert contents(place) == before[0]
    assert (contents(adapter) if adapter.is_dir() else None) == before[1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return " ".join(printed.err.split())


def refusal(adapter, kit):
    """The error of the check alone; the directory is as it was."""
    before = contents(adapter)
    with pytest.raises(ModelError) as caught:
        check_adapter(adapter, kit)
    assert contents(adapter) == before
    return " ".join(str(caught.value).split())


# ---- what is plugged in


@pytest.mark.parametrize("name", KINDS)
def test_an_untouched_adapter_changes_nothing(name, place, tmp_path):
    family, adapter = kind(place, name, tmp_path / "a", size=0)
    kit = open_kit(place / f"{family}.kit")
    model, _ = load_full(place / family, kit)
    before = ids(model)
    plugged = plug_in(model, check_adapter(adapter, kit), kit.plan)
    assert torch.equal(ids(plugged), before)
    assert before.std() > 0.05


@pytest.mark.parametrize("name", KINDS)
def test_it_does_what_the_library_does_with_the_directory(name, place, tmp_path):
    family, adapter = kind(place, name, tmp_path / "a")
    kit = open_kit(place / f"{family}.kit")
    model, _ = load_full(place / family, kit)
    before = ids(model)
    checked = check_adapter(adapter, kit)
    after = ids(plug_in(model, checked, kit.plan))
    assert (after - before).abs().max() > 0.05
    whole = whole_model(place / family, task_of(family), **({"num_labels": 2} if family == "bert" else {}))
    assert torch.equal(ids(PeftModel.from_pretrained(whole, adapter).eval()), after)
    run(*base_words(place, family), "--adapter", adapter, "--out", tmp_path / "out")
    again = whole_model(place / family, task_of(family), **({"num_labels": 2} if family == "bert" else {}))
    assert torch.equal(ids(PeftModel.from_pretrained(again, tmp_path / "out").eval()), after)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_change_is_the_scaled_product_added_to_the_weights(family, place, tmp_path):
    adapter = made(place, tmp_path / "a", family, r=3, lora_alpha=6)
    kit = open_kit(place / f"{family}.kit")
    plugged = plug_in(load_full(place / family, kit)[0], check_adapter(adapter, kit), kit.plan)
    tensors, whole = load_file(adapter / ADAPTER_FILE), whole_model(place / family)
    weights = dict(whole.named_parameters())
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = 2.0 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            weights[f"{module}.weight"].data += change.T if family == "gpt2" else change
    torch.testing.assert_close(ids(plugged), ids(whole), rtol=1e-3, atol=1e-4)


def test_what_was_written_does_the_same_through_the_split(place, tmp_path):
    adapters = [made(place, tmp_path / "a"), made(place, tmp_path / "b", seed=2, target_modules=["up_proj"])]
    words = [word for path in adapters for word in ("--adapter", path)]
    run(*base_words(place), *words, "--out", tmp_path / "out")
    kit = open_kit(place / "llama.kit")
    link = LocalLink(Trunk(load_trunk_side(place / "llama", kit.plan, dtype=torch.float32), kit.plan))
    party = open_adapter(open_model(kit, link), tmp_path / "out").eval()
    whole = PeftModel.from_pretrained(whole_model(place / "llama"), tmp_path / "out").eval()
    assert torch.equal(ids(party), ids(whole))
    assert (ids(whole) - ids(whole_model(place / "llama"))).abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_figures_are_those_of_the_full_model_without_and_with_it(family, place, tmp_path, capsys):
    adapter = made(place, tmp_path / "a", family)
    rows = place / ("labelled.jsonl" if family == "bert" else "held.jsonl")
    untouched = contents(place)
    run(*base_words(place, family), "--adapter", adapter, "--eval", rows, "--out", tmp_path / "out", "--json",
        tmp_path / "p.json", "--per-device-eval-batch-size", 4)  # fmt: skip
    assert contents(place) == untouched
    kit, task = open_kit(place / f"{family}.kit"), task_of(family)
    label2id = dict(kit.config.label2id) if family == "bert" else None
    tokenizer = tokenizer_of(kit.path)
    examples = tokenise(load_rows(rows, task=task, label2id=label2id), tokenizer, max_length=128)
    collator = Collator(tokenizer, pad_token_id=kit.config.pad_token_id)

    def score(model):
        return evaluate(model, examples, collator, task=task, batch_size=4).facts()

    model, _ = load_full(place / family, kit)
    before = score(model)
    after = score(PeftModel.from_pretrained(model, adapter).eval())
    held = json.loads((tmp_path / "p.json").read_text())
    found = {one["metric"]: one for one in held["results"] if one["case"] == "plug-in"}
    assert {name: one["value"] for name, one in found.items()} == after
    assert {name: one["reference"] for name, one in found.items()} == before
    assert before["loss"] != after["loss"]
    told = capsys.readouterr().out
    assert f"{before['loss']:.4f}" in told
    assert f"{after['loss']:.4f}" in told
    assert ("worse with the adapter" in told) == (after["loss"] > before["loss"])
    if family == "llama":
        whole = score(whole_model(place / "llama"))
        assert whole == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out", "p.json"]
    assert str(tmp_path.parent) not in (tmp_path / "out" / CONFIG_FILE).read_text()


def test_a_head_drawn_for_the_kit_is_the_one_that_is_measured(place, tmp_path, capsys):
    """The checkpoint has no head for these classes: what was drawn for the kit stands before the adapter comes."""
    kit = open_kit(place / "bert.kit")
    torch.manual_seed(7)
    model, own = load_full(place / "bert", kit)
    assert own == ["classifier.bias", "classifier.weight"] or own == ["classifier.weight"]
    assert torch.equal(model.classifier.weight, kit.load().classifier.weight)


def test_without_rows_and_out_it_is_checked_alone(place, tmp_path, capsys):
    run(*base_words(place), "--adapter", made(place, tmp_path / "a"), "--json", tmp_path / "p.json")
    assert "was not plugged in" in capsys.readouterr().out
    held = {one["metric"]: one["value"] for one in json.loads((tmp_path / "p.json").read_text())["results"]}
    assert held["rank"] == 4
    assert held["values"] == sum(tensor.numel() for tensor in load_file(tmp_path / "a" / ADAPTER_FILE).values())


@pytest.mark.slow
def test_an_adapter_tuned_on_an_emulator_comes_back_and_is_used_through_the_split(place, tmp_path):
    """Emulator out, two adapters back, their mean plugged in; then a party's run evaluates it, the trunk at the owner.

    A run of the split protocol is made first, for its directory: what the owner wrote takes its adapter's place.
    """
    held = place / "held.jsonl"
    splitfl_here("emulator", tmp_path / "e", *base_words(place), "--keep", 1)
    train = ["--train", held, "--max-steps", 3, "--learning-rate", 5e-3]
    offline = ["--kit", place / "llama.kit", "--protocol", "guarded-offline", "--emulator", tmp_path / "e", *train]
    for seed in (1, 2):
        splitfl_here("tune", *offline, "--seed", seed, "--out", tmp_path / f"run{seed}")
    adapters = [word for seed in (1, 2) for word in ("--adapter", tmp_path / f"run{seed}" / "adapter")]
    run(*base_words(place), *adapters, "--out", tmp_path / "out", "--eval", held, "--json", tmp_path / "p.json")
    told = {one["metric"]: one["value"] for one in json.loads((tmp_path / "p.json").read_text())["results"]}
    with serve(place / "llama", place / "llama.kit", tmp_path / "owner") as owner:
        splitfl_here("tune", *owner.link(), *train, "--out", tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "adapter")
        shutil.copytree(tmp_path / "out", tmp_path / "run" / "adapter")
        splitfl_here("evaluate", "--run", tmp_path / "run", "--eval", held, "--json", tmp_path / "s.json")
        splitfl_here("generate", "--run", tmp_path / "run", "--prompt", "Agnes sang", "--max-new-tokens", 4)
    split = {one["metric"]: one["value"] for one in json.loads((tmp_path / "s.json").read_text())["results"]}
    assert split["loss"] == pytest.approx(told["loss"], rel=1e-6)
    assert split["counted"] == told["counted"]


# ---- several adapters


def dense_changes(plugged):
    """Module to the change of its weight, float64, by PEFT's own product."""
    return {
        name.removeprefix("base_model.model."): module.double().get_delta_weight("default").clone()
        for name, module in plugged.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_several_adapters_make_the_weighted_mean_of_their_changes(place, tmp_path):
    kit = open_kit(place / "llama.kit")
    paths = [
        made(place, tmp_path / "a", r=3, lora_alpha=9),
        made(place, tmp_path / "b", r=5, seed=2, use_rslora=True, target_modules=["v_proj", "up_proj"]),
        made(place, tmp_path / "c", r=2, seed=3, layers=[4, 5], target_modules=["q_proj"]),
    ]
    adapters = [check_adapter(path, kit) for path in paths]
    merged = combined(adapters, kit, [3, 1, 4])
    assert merged.config.r == 10
    found = dense_changes(plug_in(load_full(place / "llama", kit)[0], merged, kit.plan))
    each = [dense_changes(plug_in(load_full(place / "llama", kit)[0], one, kit.plan)) for one in adapters]
    assert set(found) >= set().union(*each)
    for name, change in found.items():
        wanted = sum(share * one[name] for share, one in zip((3 / 8, 1 / 8, 4 / 8), each, strict=True) if name in one)
        wanted = torch.zeros_like(change) + wanted
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6 * max(float(wanted.abs().max()), 1e-3))
    # The product of the mean factors, which some systems take, is something else.
    one, two = adapters[0], check_adapter(made(place, tmp_path / "d", r=3, lora_alpha=9, seed=9), kit)
    exact = dense_changes(plug_in(load_full(place / "llama", kit)[0], combined([one, two], kit), kit.plan))
    name, stem = "model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"
    a = (one.tensors[f"{stem}.lora_A.weight"] + two.tensors[f"{stem}.lora_A.weight"]) / 2
    b = (one.tensors[f"{stem}.lora_B.weight"] + two.tensors[f"{stem}.lora_B.weight"]) / 2
    assert (exact[name] - 3 * (b @ a)).norm() > 0.2 * exact[name].norm()


def test_biases_and_heads_are_averaged(place, tmp_path):
    kit = open_kit(place / "bert.kit")
    adapters = [
        check_adapter(made(place, tmp_path / "a", "bert", bias="lora_only"), kit),
        check_adapter(made(place, tmp_path / "b", "bert", seed=2, target_modules=["query"]), kit),
    ]
    merged = combined(adapters, kit, [1, 3])
    head = "base_model.model.classifier.weight"
    torch.testing.assert_close(
        merged.tensors[head], 0.25 * adapters[0].tensors[head] + 0.75 * adapters[1].tensors[head]
    )
    bias = "base_model.model.bert.encoder.layer.5.attention.self.query.base_layer.bias"
    own = kit.load().bert.encoder.layer[5].attention.self.query.bias
    torch.testing.assert_close(merged.tensors[bias], 0.25 * adapters[0].tensors[bias] + 0.75 * own)
    run(*base_words(place, "bert"), "--adapter", tmp_path / "a", "--adapter", tmp_path / "b", "--weights", 2,
        "--weights", 6, "--out", tmp_path / "out")  # fmt: skip
    written = load_file(tmp_path / "out" / ADAPTER_FILE)
    assert written.keys() == merged.tensors.keys()
    assert all(torch.equal(written[name], merged.tensors[name]) for name in written)


def test_one_adapter_is_left_as_it_is(place, tmp_path):
    kit = open_kit(place / "llama.kit")
    one = check_adapter(made(place, tmp_path / "a"), kit)
    assert combined([one], kit, [5.0]) is one


def test_what_cannot_be_combined_is_refused(place, tmp_path, capsys):
    a, b = made(place, tmp_path / "a"), made(place, tmp_path / "b", seed=2, use_dora=True)
    assert "DoRA adapter" in refused(place, a, tmp_path, capsys, "--adapter", b, code=2)
    assert "same directory twice" in refused(
        place, a, tmp_path, capsys, "--adapter", tmp_path / "b" / ".." / "a", code=2
    )
    assert "one weight for each" in refused(place, a, tmp_path, capsys, "--adapter", b, "--weights", 1, code=2)
    words = ["--adapter", b, "--weights", 1, "--weights", 0]
    assert "--weights was given as 0.0" in refused(place, a, tmp_path, capsys, *words, code=2)


# ---- how large a change is


@pytest.mark.parametrize("name", ["llama, all", "llama, dora", "gpt2, biases", "gpt2, dora"])
def test_the_change_is_measured_as_merging_would_change_the_weights(name, place, tmp_path):
    family, adapter = kind(place, name, tmp_path / "a")
    kit = open_kit(place / f"{family}.kit")
    checked = check_adapter(adapter, kit)
    model = PeftModel.from_pretrained(kit.load(), adapter).eval()
    ratios, moved, whole = {}, 0.0, 0.0
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            before = module.get_base_layer().weight.detach().clone().double()
            module.merge()
            change = module.get_base_layer().weight.detach().double() - before
            ratios[path.removeprefix("base_model.model.")] = float(change.norm() / before.norm())
            moved, whole = moved + float(change.norm()) ** 2, whole + float(before.norm()) ** 2
    assert checked.change.where == max(ratios, key=ratios.__getitem__)
    assert checked.change.largest == pytest.approx(max(ratios.values()), rel=1e-4)
    assert checked.change.total == pytest.approx(math.sqrt(moved / whole), rel=1e-4)


def test_a_change_over_the_cap_is_refused_and_one_below_is_not(place, tmp_path):
    kit, adapter = open_kit(place / "llama.kit"), made(place, tmp_path / "a")
    change = check_adapter(adapter, kit).change
    assert 0 < change.total < change.largest < 2
    limit = max(change.largest, 2 * change.total)
    assert check_adapter(adapter, kit, max_norm=1.001 * limit).change == change
    with pytest.raises(ModelError, match="times"):
        check_adapter(adapter, kit, max_norm=0.999 * limit)
    with pytest.raises(ModelError, match=change.where):
        check_adapter(adapter, kit, max_norm=0.999 * change.largest)


def altered(adapter, change):
    """The adapter with its tensors changed by `change(tensors)`, in place."""
    file = adapter / ADAPTER_FILE
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return adapter


def first(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


def test_all_weights_together_have_a_cap_of_their_own(place, tmp_path, capsys):
    kit, adapter = open_kit(place / "llama.kit"), made(place, tmp_path / "a", size=0.05)

    def level(tensors):  # every change 1.5 times its weight: each is allowed alone, together they are not
        weights = dict(kit.load().named_parameters())
        for name in [name for name in tensors if "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            weight = weights[name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")]
            norm = float((16 / 4 * tensors[other] @ tensors[name]).norm())
            tensors[other] *= 1.5 * float(weight.detach().norm()) / norm

    told = refused(place, altered(adapter, level), tmp_path, capsys)
    assert "change its weights together by 1.5 times" in told
    assert "at most 1 times" in told
    run(*base_words(place), "--adapter", adapter, "--max-norm", 8, "--out", tmp_path / "out")


def scaled(part, factor):
    def change(tensors):
        tensors[first(tensors, part)].mul_(factor)

    return change


def balanced(tensors):
    """One factor huge and the other tiny: the product is what it was."""
    name = first(tensors, "lora_A")
    tensors[name].mul_(1e12)
    tensors[name.replace("lora_A", "lora_B")].mul_(1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled("lora_B", 1e4), "times its norm"),
        (scaled("lora_A", 1e36), "times its norm"),
        (balanced, "root mean square"),
    ],
)
def test_oversized_values_are_refused(change, words, adapter, llama):
    assert words in refusal(altered(adapter, change), llama)


@pytest.mark.parametrize("part", ["classifier.weight", "classifier.bias", "base_layer.bias"])
def test_an_oversized_head_or_bias_is_refused(part, place, tmp_path):
    kit = open_kit(place / "bert.kit")
    adapter = made(place, tmp_path / "a", "bert", bias="lora_only")
    check_adapter(adapter, kit)

    def change(tensors):
        tensors[first(tensors, part)] += 3

    with pytest.raises(ModelError, match=f"{part.replace('.', '[.]')}.*root mean square"):
        check_adapter(altered(adapter, change), kit)


def test_a_bias_is_measured_by_its_change_and_not_by_its_size(place, tmp_path):
    save_tiny("gpt2", tmp_path / "gpt2")
    large = whole_model(tmp_path / "gpt2")
    with torch.no_grad():
        for layer in large.transformer.h:
            layer.attn.c_attn.bias.add_(7)
    large.save_pretrained(tmp_path / "gpt2")
    kit = open_kit(make_kit(tmp_path / "gpt2", tmp_path / "gpt2.kit"))
    adapter = made(tmp_path, tmp_path / "a", "gpt2", bias="lora_only")
    bias = check_adapter(adapter, kit).tensors["base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"]
    assert bias.mean() > 6


def test_a_magnitude_of_dora_counts_as_a_change(place, tmp_path):
    kit = open_kit(place / "llama.kit")
    adapter = altered(made(place, tmp_path / "a", use_dora=True), scaled("magnitude", 50.0))
    with pytest.raises(ModelError, match="times its norm"):
        check_adapter(adapter, kit)


def test_a_change_that_is_not_a_number_is_over_every_cap(place, tmp_path):
    """Rows of weights that cancel out leave DoRA nothing to normalise."""
    kit = open_kit(place / "llama.kit")
    adapter = made(place, tmp_path / "a", use_dora=True, r=32, lora_alpha=32)

    def cancel(tensors):
        name = first(tensors, "lora_A")
        stem = name.removesuffix(".lora_A.weight")
        weight = dict(kit.load().named_parameters())[stem.removeprefix("base_model.model.") + ".weight"]
        tensors[name] = torch.eye(32)
        tensors[f"{stem}.lora_B.weight"] = -weight.detach().clone()

    with pytest.raises(ModelError, match="by nan times its norm"):
        check_adapter(altered(adapter, cancel), kit, max_norm=1e9)


def test_a_loss_that_is_not_finite_leaves_nothing_behind(place, adapter, tmp_path, capsys):
    def beyond(tensors):  # each factor can be stored, their product cannot
        tensors.update({name: 1e25 * tensor for name, tensor in tensors.items() if "v_proj" in name})

    words = ["--max-norm", 1e60, "--eval", place / "held.jsonl"]
    told = refused(place, altered(adapter, beyond), tmp_path, capsys, *words)
    assert "is not finite; nothing was written" in told


# ---- tensors that no kit made


def rename(part, new):
    def change(tensors):
        name = first(tensors, part)
        tensors[name.replace(part, new)] = tensors.pop(name)

    return change


def put(value):
    def change(tensors):
        tensors[first(tensors, "lora_B")][0, 0] = value

    return change


def replaced(make):
    def change(tensors):
        name = first(tensors, "lora_A")
        tensors[name] = make(tensors[name]).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(first(tensors, "lora_B")), "1 missing (model.layers.0.self_attn.q_proj.lora_B"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "1 extra (more)"),
        (lambda tensors: tensors.update({"a\x1b[31m\n": torch.zeros(1)}), "1 extra (a\ufffd[31m\ufffd)"),
        (rename("layers.4.self_attn.q_proj.lora_A", "layers.3.self_attn.q_proj.lora_A"), "1 extra (model.layers.3"),
        (lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(9)}), "x4 and 4 more"),
        (lambda tensors: tensors.clear(), "16 missing"),
        (replaced(lambda t: t[:, :-1]), "model.layers.0.self_attn.q_proj.lora_A.weight is [4, 31] in float32"),
        (replaced(lambda t: t.T), "is [32, 4] in float32"),
        (replaced(lambda t: t[None]), "is [1, 4, 32] in float32"),
        (replaced(lambda t: t.double()), "in float64"),
        (replaced(lambda t: t.to(torch.int32)), "in int32"),
        (put(float("nan")), "not finite, in 1 tensors (model.layers.0.self_attn.q_proj.lora_B"),
        (put(float("inf")), "not finite"),
        (put(float("-inf")), "not finite"),
    ],
)
def test_other_tensors_than_the_kits_are_refused(change, words, adapter, llama):
    assert words in refusal(altered(adapter, change), llama)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken(dtype, place, tmp_path):
    def narrower(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    checked = check_adapter(altered(made(place, tmp_path / "a"), narrower), open_kit(place / "llama.kit"))
    assert {tensor.dtype for tensor in checked.tensors.values()} == {dtype}


def torn(file, how):
    content = file.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    made_of = {
        "empty": b"",
        "half of the length": content[:4],
        "half of the head": content[: 8 + header // 2],
        "half of the values": content[: 8 + header + (len(content) - header) // 2],
        "the last byte missing": content[:-1],
        "a byte more": content + b"\0",
        "a length beyond the file": struct.pack("<Q", 1 << 62) + content[8:],
        "no JSON": content[:8] + b"x" * header + content[8 + header :],
        "a pickle": b"\x80\x04]q\x00.",
    }
    file.write_bytes(made_of[how])


@pytest.mark.parametrize(
    "how",
    ["empty", "half of the length", "half of the head", "half of the values", "the last byte missing", "a byte more",
     "a length beyond the file", "no JSON", "a pickle"],
)  # fmt: skip
def test_a_torn_or_altered_file_is_refused(how, adapter, llama):
    torn(adapter / ADAPTER_FILE, how)
    assert "is not a whole safetensors file" in refusal(adapter, llama)


def test_what_is_refused_leaves_everything_as_it_was(place, adapter, tmp_path, capsys):
    """The command, on one fault of each kind; the others are told by the same function."""
    assert "not finite" in refused(place, altered(adapter, put(math.nan)), tmp_path, capsys)
    torn(adapter / ADAPTER_FILE, "half of the values")
    assert "is not a whole safetensors file" in refused(place, adapter, tmp_path, capsys)
    (adapter / CONFIG_FILE).write_text("{}")
    assert "does not say bias" in refused(place, adapter, tmp_path, capsys)
    (adapter / ADAPTER_FILE).unlink()
    (adapter / CONFIG_FILE).unlink()
    assert f"holds no {CONFIG_FILE}" in refused(place, adapter, tmp_path, capsys)
    good = made(place, tmp_path / "good")
    assert f"holds no {CONFIG_FILE}" in refused(place, good, tmp_path, capsys, "--adapter", adapter)


def test_files_that_are_too_large_are_not_read(place, tmp_path):
    kit = open_kit(place / "llama.kit")
    adapter = made(place, tmp_path / "a")
    with (adapter / ADAPTER_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: reading it would not fit into any memory
    with pytest.raises(ModelError, match=f"has {1 << 40} bytes and was not read"):
        check_adapter(adapter, kit)
    adapter = made(place, tmp_path / "b")
    with (adapter / CONFIG_FILE).open("a") as file:
        file.write(" " * LARGEST_CONFIG)
    with pytest.raises(ModelError, match=rf"{CONFIG_FILE} has \d+ bytes and was not read"):
        check_adapter(adapter, kit)


@pytest.mark.parametrize("gone", [CONFIG_FILE, ADAPTER_FILE])
def test_a_missing_file_is_named(gone, adapter, llama, tmp_path):
    (adapter / gone).unlink()
    assert f"holds no {gone}" in refusal(adapter, llama)
    if gone == ADAPTER_FILE:
        torch.save({}, adapter / "adapter_model.bin")
        assert "a pickled adapter, which is not read" in refusal(adapter, llama)
    assert "holds no adapter_config.json" in refusal(tmp_path / "nothing", llama)


# ---- configurations that no kit made

GONE = object()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_mapping": {"base_model_class": "A", "parent_library": "os"}}, "an object for auto_mapping"),
        ({"peft_type": "IA3"}, "'IA3' for peft_type"),
        ({"task_type": "SEQ_CLS"}, "'SEQ_CLS' for task_type"),
        ({"r": 0}, "0 for r"),
        ({"r": 33}, "a rank from 1 to 32"),
        ({"r": 4.0}, "4.0 for r"),
        ({"r": True}, "True for r"),
        ({"r": 10**30}, "for r"),
        ({"r": 5}, "is [4, 32] in float32. Expected: [5, 32]"),
        ({"lora_alpha": 0}, "0 for lora_alpha"),
        ({"lora_alpha": 1 << 21}, "for lora_alpha"),
        ({"lora_dropout": 2}, "2 for lora_dropout"),
        ({"target_modules": "all-linear"}, "'all-linear' for target_modules"),
        ({"target_modules": "(a+)+$"}, "for target_modules"),
        ({"target_modules": []}, "for target_modules"),
        ({"target_modules": ["q_proj", "q_proj"]}, "each once"),
        ({"target_modules": ["q_proj", "lm_head"]}, "a list of 'q_proj', 'lm_head' for target_modules"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' for target_modules"),
        ({"target_modules": ["proj"]}, "'proj' for target_modules"),
        ({"target_modules": ["model.layers.2.self_attn.q_proj"]}, "for target_modules"),
        ({"target_modules": [["q_proj"]]}, "a list of lists for target_modules"),
        ({"target_modules": ["q_proj"]}, "8 extra (model.layers.0.self_attn.v_proj"),
        ({"layers_to_transform": None}, "None for layers_to_transform"),
        ({"layers_to_transform": []}, "for layers_to_transform"),
        ({"layers_to_transform": 0}, "0 for layers_to_transform"),
        ({"layers_to_transform": [0, 1, 2, 4, 5]}, "some of [0, 1, 4, 5]"),
        ({"layers_to_transform": [0, 0]}, "each once"),
        ({"layers_to_transform": [True]}, "for layers_to_transform"),
        ({"layers_pattern": None}, "None for layers_pattern"),
        ({"layers_pattern": "h"}, "Expected: layers"),
        ({"fan_in_fan_out": True}, "Expected: false"),
        ({"bias": "all"}, "'all' for bias"),
        ({"use_dora": 1}, "1 for use_dora"),
        ({"use_dora": True}, "8 missing (model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' for modules_to_save"),
        ({"rank_pattern": {"q_proj": 4096}}, "an object for rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4096}}, "an object for alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "'pissa' for init_lora_weights"),
        ({"layer_replication": [[0, 6]]}, "for layer_replication"),
        ({"megatron_config": {"a": 1}}, "an object for megatron_config"),
        ({"megatron_core": "os"}, "'os' for megatron_core"),
        ({"target_parameters": ["x"]}, "for target_parameters"),
        ({"trainable_token_indices": [1]}, "for trainable_token_indices"),
        ({"revision": "main"}, "'main' for revision"),
        ({"something_new": True}, "True for something_new"),
        ({"something_new": 0}, "0 for something_new"),
        ({"base_model_name_or_path": ["/etc"]}, "for base_model_name_or_path"),
        ({"inference_mode": "no"}, "'no' for inference_mode"),
        ({"\x1b[2J": 5}, "5 for \ufffd[2J"),
        ({"peft_type": GONE}, "does not say peft_type"),
        ({"layers_to_transform": GONE}, "does not say layers_to_transform"),
    ],
)
def test_a_configuration_that_no_kit_makes_is_refused(changes, words, adapter, llama):
    given = json.loads((adapter / CONFIG_FILE).read_text()) | changes
    given = {name: value for name, value in given.items() if value is not GONE}
    (adapter / CONFIG_FILE).write_text(json.dumps(given))
    assert words in refusal(adapter, llama)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b'{"r": NaN}', b"[" * 60_000, b'{"a":' * 12_000, b"null"]
)
def test_a_configuration_that_is_no_json_object_is_refused(content, adapter, llama):
    (adapter / CONFIG_FILE).write_bytes(content)
    assert "is not a JSON object" in refusal(adapter, llama)


def test_fields_of_a_later_library_may_say_that_something_is_off(adapter, llama):
    given = json.loads((adapter / CONFIG_FILE).read_text())
    given |= {"new_flag": False, "new_thing": None, "new_map": {}, "base_model_name_or_path": "/not/here"}
    (adapter / CONFIG_FILE).write_text(json.dumps(given))
    checked = check_adapter(adapter, llama)
    assert not hasattr(checked.config, "new_flag")
    assert checked.config.base_model_name_or_path != "/not/here"


def test_a_classifiers_head_must_be_in_it(place, tmp_path):
    kit, adapter = open_kit(place / "bert.kit"), made(place, tmp_path / "a", "bert")
    check_adapter(adapter, kit)
    given = json.loads((adapter / CONFIG_FILE).read_text()) | {"modules_to_save": ["classifier", "score", "bert"]}
    (adapter / CONFIG_FILE).write_text(json.dumps(given))
    with pytest.raises(ModelError, match="modules_to_save") as caught:
        check_adapter(adapter, kit)
    assert caught.value.expected == "classifier, score"


# ---- models and kits


def test_a_kit_of_another_model_is_refused(place, tmp_path, capsys):
    adapter = made(place, tmp_path / "a")
    told = refused(place, adapter, tmp_path, capsys, "--kit", place / "gpt2.kit")
    assert "gpt2 model" in told
    assert "llama model" in told
    save_tiny("llama", tmp_path / "twin")
    twin = whole_model(tmp_path / "twin")
    with torch.no_grad():
        twin.model.layers[3].mlp.up_proj.weight[0, 0] += 1
    twin.save_pretrained(tmp_path / "twin")
    told = refused(place, adapter, tmp_path, capsys, "--model", tmp_path / "twin")
    assert open_kit(place / "llama.kit").plan.trunk in told


def test_a_model_whose_bottom_changed_since_the_kit_is_refused(place, tmp_path):
    """Its trunk is the kit's, so only a comparison of what the kit holds can tell."""
    save_tiny("llama", tmp_path / "twin")
    twin = whole_model(tmp_path / "twin")
    with torch.no_grad():
        twin.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    twin.save_pretrained(tmp_path / "twin")
    kit = kit_of(tmp_path / "twin", place / "llama.kit")
    with pytest.raises(ModelError, match=r"1 tensors of the kit .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_full(tmp_path / "twin", kit)


def test_an_adapter_of_another_cut_is_refused(place, tmp_path, capsys):
    from splitfl.kit import write_kit

    write_kit(place / "llama", tmp_path / "wide.kit", bottom=3, top=2)
    shutil.copytree(tmp_path / "wide.kit", tmp_path / "place" / "llama.kit")
    adapter = made(tmp_path / "place", tmp_path / "a")
    assert "some of [0, 1, 4, 5]" in refused(place, adapter, tmp_path, capsys)


def test_a_directory_that_holds_something_is_not_touched(place, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    run(*base_words(place), "--adapter", made(place, tmp_path / "a"), "--out", tmp_path / "out", code=4)
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_rows_that_cannot_be_read_leave_nothing_behind(place, tmp_path, capsys):
    told = refused(place, made(place, tmp_path / "a"), tmp_path, capsys, "--eval", tmp_path / "no.jsonl", code=3)
    assert "there is no file" in told
    words = ["--eval", place / "held.jsonl", "--max-length", 1000]
    assert "positions end at 128" in refused(place, tmp_path / "a", tmp_path, capsys, *words, code=2)


def test_checking_leaves_the_generator_as_it_was(place, tmp_path):
    adapter, kit = made(place, tmp_path / "a"), open_kit(place / "llama.kit")
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    check_adapter(adapter, kit)
    assert torch.equal(torch.rand(3), wanted)


def test_a_weight_that_is_zero_has_no_scale_of_its_own(place, tmp_path):
    kit = open_kit(place / "llama.kit")
    base = kit.load()
    with torch.no_grad():
        for layer in base.model.layers[:2]:
            layer.self_attn.q_proj.weight.zero_()
    adapter = check_adapter(made(place, tmp_path / "a"), kit)
    wrapped = fresh(base, adapter.config)
    change = measured_change(wrapped, adapter.tensors)
    assert math.isfinite(change.largest)
