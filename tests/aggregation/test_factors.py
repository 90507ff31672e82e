import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import GPT2Config, GPT2ForSequenceClassification

from splitfl.aggregation.factors import Layout, Pair, Update
from splitfl.aggregation.low_rank import best, norm, orthonormal, squeezed, stacked
from splitfl.aggregation.peft_format import adapter_from_update, config_of, final_adapter, update_from_adapter
from splitfl.aggregation.state import State, fresh_factor
from splitfl.errors import ModelError, UsageError, WireError
from tests.aggregation.parties import adapter, change, dense, gap, same_bits


class TestVector:
    @pytest.mark.parametrize("part", ["A", "B", "both"])
    def test_comes_back_bit_for_bit(self, part):
        one, other = adapter(1), adapter(2)
        layout = Layout.of(one)
        vector = layout.to_vector(one, part)
        assert vector.dtype == np.float32
        assert len(vector) == layout.length(part)
        back = layout.from_vector(vector, part, onto=other)
        assert same_bits(
            back,
            other.map(
                lambda n, p: Pair(
                    one.pairs[n].a if part != "B" else p.a, one.pairs[n].b if part != "A" else p.b, p.scale
                ),
                one.extras,
            ),
        )

    def test_is_in_name_order_a_before_b_extras_last(self):
        update = adapter(1)
        shuffled = Update(dict(reversed(update.pairs.items())), update.extras)
        vector = Layout.of(shuffled).to_vector(shuffled)
        first, last = update.pairs[min(update.pairs)], update.extras["score.weight"]
        expected = torch.cat([first.a.reshape(-1), first.b.reshape(-1)]).numpy()
        np.testing.assert_array_equal(vector[: len(expected)], expected)
        np.testing.assert_array_equal(vector[-last.numel() :], last.reshape(-1).numpy())
        assert Layout.of(shuffled).digest == Layout.of(update).digest

    def test_half_is_half(self):
        layout = Layout.of(adapter(1))
        assert layout.length("A", extras=False) + layout.length("B", extras=False) == layout.length(extras=False)

    def test_another_scale_is_brought_to_the_layouts(self):
        layout = Layout.of(adapter(1, scale=2.0))
        other = adapter(3, scale=3 / 7)
        back = layout.from_vector(layout.to_vector(other))
        for name, pair in other.pairs.items():
            assert back.pairs[name].scale == 2.0
            assert gap(dense(back.pairs[name]), dense(pair)) < 1e-7

    @pytest.mark.parametrize(
        "change",
        [
            {"rank": 5},
            {"scale": 1.0},
            {"widths": {"layers.0.q_proj": (12, 10), "layers.0.v_proj": (12, 7), "layers.1.mlp": (8, 20)}},
        ],
    )
    def test_the_digest_tells_layouts_apart(self, change):
        assert Layout.of(adapter(1, **change)).digest != Layout.of(adapter(1)).digest

    def test_values_that_are_not_finite_are_refused_and_the_tensor_is_named(self):
        update = adapter(1)
        layout = Layout.of(update)
        update.pairs["layers.1.mlp"].b[3, 2] = float("nan")
        with pytest.raises(ModelError, match=r"Factor B of layers\.1\.mlp holds values that are not finite") as caught:
            layout.to_vector(update)
        assert "nan" not in str(caught.value).replace("not finite", "")
        layout.to_vector(update, "A")
        vector = layout.to_vector(adapter(1))
        vector[-1] = np.inf
        with pytest.raises(WireError, match=r"score\.weight holds values"):
            layout.from_vector(vector)

    @pytest.mark.parametrize("more", [-1, 1])
    def test_another_length_is_refused(self, more):
        layout = Layout.of(adapter(1))
        with pytest.raises(WireError, match="no update of this federation"):
            layout.from_vector(np.zeros(layout.length() + more, dtype=np.float32))

    def test_another_dtype_is_refused(self):
        layout = Layout.of(adapter(1))
        with pytest.raises(WireError, match="float64"):
            layout.from_vector(np.zeros(layout.length()))

    def test_other_modules_and_ranks_are_refused_by_name(self):
        update = adapter(1)
        layout = Layout.of(update)
        fewer = Update({n: p for n, p in update.pairs.items() if n != "layers.1.mlp"}, update.extras)
        with pytest.raises(ModelError, match=r"layers\.1\.mlp is part .*lacks it"):
            layout.to_vector(fewer)
        with pytest.raises(ModelError, match=r"score\.weight"):
            layout.to_vector(Update(update.pairs))
        with pytest.raises(ModelError, match=r"Factor A of layers\.0\.q_proj has shape \(5, 12\)"):
            layout.to_vector(adapter(1, rank=5))

    def test_half_a_vector_needs_the_other_half(self):
        layout = Layout.of(adapter(1))
        with pytest.raises(ModelError, match="nothing stands in"):
            layout.from_vector(layout.to_vector(adapter(1), "A"), "A")


class TestUpdate:
    @pytest.mark.parametrize(
        ("pair", "said"),
        [
            (Pair(torch.zeros(2, 3), torch.zeros(4, 3)), r"\(2, 3\), \(4, 3\)"),
            (Pair(torch.zeros(2, 3, 1), torch.zeros(4, 2)), r"\(2, 3, 1\)"),
            (Pair(torch.zeros(2, 3), torch.zeros(4, 2), 1.0, torch.zeros(3, 3)), r"\(3, 3\)"),
            (Pair(torch.zeros(2, 3).double(), torch.zeros(4, 2)), "Factor A of m is torch.float64"),
            (Pair(torch.zeros(2, 3), torch.zeros(4, 2), 0.0), "scale of m"),
            (Pair(torch.zeros(2, 3), torch.zeros(4, 2), math.inf), "scale of m"),
        ],
    )
    def test_what_makes_no_change_is_refused(self, pair, said):
        with pytest.raises(ModelError, match=said):
            Update({"m": pair})

    def test_a_name_of_a_peer_is_made_printable(self):
        with pytest.raises(ModelError) as caught:
            Update({"a\x1b[31m": Pair(torch.zeros(2, 3), torch.zeros(4, 3))})
        assert "\x1b" not in str(caught.value)


class TestLowRank:
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 99),
        st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.5, 2.0])), min_size=1, max_size=4),
    )
    def test_a_stack_is_the_sum(self, seed, parties):
        updates = [adapter(seed + k, rank=r, scale=s).pairs["layers.0.v_proj"] for k, (r, s) in enumerate(parties)]
        weights = [0.3 * (k + 1) for k in range(len(updates))]
        expected = sum(w * dense(p) for w, p in zip(weights, updates, strict=True))
        whole = stacked(updates, weights)
        assert whole.rank == sum(rank for rank, _ in parties)
        assert gap(dense(whole), expected) < 1e-6
        assert norm(updates, weights) == pytest.approx(float(torch.linalg.norm(expected)), rel=1e-9)
        small = squeezed(whole)
        assert small.rank == min(whole.rank, 6)
        assert gap(dense(small), expected) < 1e-6

    def test_a_wide_module_is_squeezed_too(self):
        whole = stacked([adapter(k, rank=9).pairs["layers.1.mlp"] for k in range(3)])
        small = squeezed(whole)
        assert small.rank == 8
        assert gap(dense(small), dense(whole)) < 1e-6

    def test_the_norm_keeps_its_digits_where_changes_cancel(self):
        one = adapter(1).pairs["layers.0.q_proj"]
        other = Pair(one.a, one.b * (1 + 1e-6), one.scale)
        expected = float(torch.linalg.norm(dense(one) - dense(other)))
        assert norm([one, other], [1.0, -1.0]) == pytest.approx(expected, rel=1e-6)
        assert norm([one, one], [1.0, -1.0]) < 1e-12 * norm([one])

    @pytest.mark.parametrize("rank", [1, 3, 6])
    def test_the_best_approximation_is_that_of_the_dense_svd(self, rank):
        pairs, weights = [adapter(k).pairs["layers.0.v_proj"] for k in range(3)], [0.2, 0.3, 0.5]
        whole = sum(w * dense(p) for w, p in zip(weights, pairs, strict=True))
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        found = best(pairs, weights, rank, 2.0)
        assert found.rank == rank
        assert gap(dense(found), u[:, :rank] * s[:rank] @ vh[:rank]) < 1e-6
        np.testing.assert_allclose(found.a.norm(dim=1), torch.sqrt(s[:rank] / 2.0), rtol=1e-5)
        np.testing.assert_allclose(found.b.norm(dim=0), torch.sqrt(s[:rank] / 2.0), rtol=1e-5)

    def test_directions_that_carry_nothing_can_still_be_trained(self):
        start = Pair(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(10, 4), 2.0)
        found = best([start, start], [0.5, 0.5], 4, 2.0)
        assert not found.b.any()
        np.testing.assert_allclose(found.a.norm(dim=1), 1 / math.sqrt(3), rtol=1e-6)

    def test_orthonormal_columns_stay_as_they_are(self):
        q = orthonormal(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(orthonormal(q), q)


class TestPeftFormat:
    NAME = "base_model.model.model.layers.0.self_attn.q_proj"

    def tensors(self, rank, dtype=torch.float32):
        generator = torch.Generator().manual_seed(rank)
        return {
            f"{self.NAME}.lora_A.weight": torch.randn(rank, 12, generator=generator).to(dtype),
            f"{self.NAME}.lora_B.weight": torch.randn(10, rank, generator=generator).to(dtype),
            "base_model.model.score.weight": torch.randn(3, 12, generator=generator).to(dtype),
        }

    @pytest.mark.parametrize(
        ("config", "scale"),
        [
            (LoraConfig(r=8, lora_alpha=16), 2.0),
            (LoraConfig(r=7, lora_alpha=3), 3 / 7),
            (LoraConfig(r=5, lora_alpha=16, use_rslora=True), 16 / math.sqrt(5)),
            (LoraConfig(r=6, lora_alpha=16, alpha_pattern={"q_proj": 5}), 5 / 6),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bits_come_back_through_a_vector(self, config, scale, dtype):
        tensors = self.tensors(config.r, dtype)
        update = update_from_adapter(tensors, config)
        assert update.pairs["model.layers.0.self_attn.q_proj"].scale == scale
        assert list(update.extras) == ["score.weight"]
        layout = Layout.of(update)
        back = adapter_from_update(layout.from_vector(layout.to_vector(update)), config, dtype=dtype)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == dtype
            assert torch.equal(back[name], tensor), name

    def test_a_scale_of_its_own_is_taken_off_again(self):
        update = update_from_adapter(self.tensors(8), LoraConfig(r=8, lora_alpha=16))
        config = LoraConfig(r=8, lora_alpha=3)
        again = update_from_adapter(adapter_from_update(update, config), config)
        name = "model.layers.0.self_attn.q_proj"
        assert gap(dense(again.pairs[name]), dense(update.pairs[name])) < 1e-6

    @pytest.mark.parametrize("left_out", ["A", "B"])
    def test_half_a_pair_is_refused(self, left_out):
        tensors = self.tensors(4)
        del tensors[f"{self.NAME}.lora_{left_out}.weight"]
        with pytest.raises(ModelError, match=f"no factor {left_out}"):
            update_from_adapter(tensors, LoraConfig(r=4))

    def test_dora_is_refused(self):
        tensors = {**self.tensors(4), f"{self.NAME}.lora_magnitude_vector.weight": torch.ones(10)}
        with pytest.raises(UsageError, match="magnitude"):
            update_from_adapter(tensors, LoraConfig(r=4))

    def test_another_rank_than_the_configuration_says_is_refused(self):
        update = update_from_adapter(self.tensors(4), LoraConfig(r=4))
        with pytest.raises(ModelError, match=r"rank 4.* says 8"):
            adapter_from_update(update, LoraConfig(r=8))
        assert config_of(update, LoraConfig(r=8, lora_alpha=16)).r == 4

    def test_a_configuration_for_mixed_ranks_keeps_every_scale(self):
        pairs = {f"m.{k}": Pair(torch.zeros(k, 9), torch.zeros(9, k), 0.3 * k) for k in (1, 2, 5)}
        pairs["x.m.1"] = Pair(torch.zeros(3, 9), torch.zeros(9, 3), 7.0)
        config = config_of(Update(pairs), LoraConfig(r=8, lora_alpha=16, use_rslora=True))
        tensors = adapter_from_update(Update(pairs), config)
        back = update_from_adapter(tensors, config)
        assert {n: p.rank for n, p in back.pairs.items()} == {"m.1": 1, "m.2": 2, "m.5": 5, "x.m.1": 3}
        for name, pair in back.pairs.items():
            assert pair.scale == pytest.approx(pairs[name].scale)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_an_adapter_of_a_classifier_goes_round_whole(bias):
    """GPT-2: its modules are transposed, its head is tuned whole, and biases may be tuned with it."""
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, n_positions=8, num_labels=3, **ends)
    lora = LoraConfig(r=3, lora_alpha=4, task_type=TaskType.SEQ_CLS, bias=bias, fan_in_fan_out=True)

    def fresh():
        torch.manual_seed(0)
        return get_peft_model(GPT2ForSequenceClassification(config), lora).eval()

    model = fresh()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    update = update_from_adapter(tensors, lora)
    assert update.pairs.keys() == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    assert "score.weight" in update.extras
    assert len(update.extras) == (1 if bias == "none" else 3)
    layout, x = Layout.of(update), torch.tensor([[1, 2, 3]])
    before = model(input_ids=x).logits.detach()
    back, told = final_adapter(State(adapter=layout.from_vector(layout.to_vector(update))), lora)
    assert told is lora
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    other = fresh()
    assert not torch.equal(other(input_ids=x).logits.detach(), before)
    assert not set_peft_model_state_dict(other, back).unexpected_keys
    torch.testing.assert_close(other(input_ids=x).logits.detach(), before, rtol=0, atol=0)


class TestState:
    def state(self, **more):
        update = adapter(1)
        return State(adapter=update, merged={"layers.1.mlp": adapter(2, rank=3).pairs["layers.1.mlp"]}, seed=7, **more)

    def test_bytes_bring_it_back(self):
        state = self.state(gradient={name: torch.ones(4, 4) for name in adapter(1).pairs})
        back = State.from_bytes(state.to_bytes(), like=self.state())
        assert back.digest == state.digest
        assert back.seed == 7
        assert back.layout == state.layout

    def test_a_core_comes_back(self):
        pair = Pair(torch.ones(2, 3), torch.ones(4, 2), 0.7, torch.eye(2))
        state = State(adapter=Update({"a/b.c": pair}))
        assert State.from_bytes(state.to_bytes()).digest == state.digest

    def test_the_digest_sees_every_bit(self):
        state, other = self.state(), self.state()
        assert state.digest == other.digest
        other.adapter.pairs["layers.0.q_proj"].a[0, 0] = torch.nextafter(
            other.adapter.pairs["layers.0.q_proj"].a[0, 0], torch.tensor(9.0)
        )
        assert state.digest != other.digest

    @pytest.mark.parametrize("cut", [0, 7, 100, -1])
    def test_a_part_of_it_is_refused(self, cut):
        with pytest.raises(WireError, match="cannot be read"):
            State.from_bytes(self.state().to_bytes()[:cut])

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_bytes_of_a_peer_are_a_state_or_an_error(self, data):
        raw = bytearray(self.state().to_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        try:
            back = State.from_bytes(bytes(raw), like=self.state())
        except WireError:
            return
        assert all(
            torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all() for pair in back.adapter.pairs.values()
        )

    def test_values_that_are_not_finite_are_refused(self):
        state = self.state()
        state.adapter.extras["score.weight"][0, 0] = math.nan
        with pytest.raises(WireError, match="cannot be read"):
            State.from_bytes(state.to_bytes())

    def test_one_of_another_federation_is_refused(self):
        other = State(adapter=adapter(1, widths={"layers.0.q_proj": (12, 10)}))
        with pytest.raises(WireError, match="another federation"):
            State.from_bytes(other.to_bytes(), like=self.state())

    def test_a_seed_out_of_range_is_refused(self):
        with pytest.raises(ModelError, match="seed"):
            State(adapter=adapter(1), seed=1 << 63)

    def test_merged_changes_of_other_modules_are_refused(self):
        with pytest.raises(ModelError, match="merged"):
            State(adapter=adapter(1), merged={"other": adapter(1).pairs["layers.1.mlp"]})

    def test_fresh_factors_are_the_same_everywhere(self):
        """The figure is fixed: whoever changes how factors are drawn makes federations that cannot go on."""
        drawn = fresh_factor(3, "layers.0.q_proj", 4, 12)
        assert drawn.dtype == torch.float32
        assert re.match(r"[0-9a-f]{64}", State(adapter=adapter(1)).digest)
        told = ["0x1.90b3100000000p-2", "-0x1.5cf00c0000000p-2", "-0x1.0f60d80000000p-6"]
        assert [value.hex() for value in fresh_factor(3, "layers.0.q_proj", 1, 3).reshape(-1).tolist()] == told
        assert not torch.equal(drawn, fresh_factor(4, "layers.0.q_proj", 4, 12))
        assert not torch.equal(drawn, fresh_factor(3, "layers.0.q_proj", 4, 12, draw=1))
        assert not torch.equal(drawn, fresh_factor(3, "layers.0.v_proj", 4, 12))

    def test_fresh_factors_are_uniform_as_lora_draws_them(self):
        drawn = fresh_factor(0, "m", 64, 1000) * math.sqrt(1000)
        assert drawn.abs().max() <= 1
        assert abs(float(drawn.mean())) < 0.01
        assert float((drawn**2).mean()) == pytest.approx(1 / 3, rel=0.02)


class TestFinalAdapter:
    def test_with_nothing_merged_it_is_the_adapter(self):
        config = LoraConfig(r=4, lora_alpha=8)
        state = State(adapter=adapter(1))
        tensors, told = final_adapter(state, config)
        assert told is config
        assert same_bits(update_from_adapter(tensors, config), state.adapter)

    def test_merged_and_adapter_are_stacked(self):
        state = State(adapter=adapter(1), merged={"layers.1.mlp": adapter(2, rank=3, scale=0.5).pairs["layers.1.mlp"]})
        tensors, config = final_adapter(state, LoraConfig(r=4, lora_alpha=8))
        back = update_from_adapter(tensors, config)
        assert (config.r, config.lora_alpha) == (7, 7)
        for name, pair in back.pairs.items():
            assert pair.scale == 1.0
            assert gap(dense(pair), change(state, name)) < 1e-6
