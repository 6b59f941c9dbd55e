"""Positions and masks derived from all ids: however an answer is cut into steps, it is the answer of one pass."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

from tests.helpers.reference import fresh_model, model, tokenizer
from tests.helpers.tiny_models import PROMPTS
from thuglm.modeling_chatglm import CACHE_NAME
from thuglm.prefix_mask import continued_positions, make_position_ids, make_visible

SOP, GMASK, MASK = 2660, 2657, 2656
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def noisy_copy():
    """An assistant that is sometimes wrong."""
    net = copy.deepcopy(model())
    torch.manual_seed(0)
    for parameter in net.transformer.layers[-1].parameters():
        parameter.data += torch.randn_like(parameter) * parameter.std() * 0.4
    return net


# Guessed tokens ----------------------------------------------------------------------------------------------------

GUESSES = {
    "lookup 2": lambda: {"prompt_lookup_num_tokens": 2},
    "lookup 7": lambda: {"prompt_lookup_num_tokens": 7},
    "itself": lambda: {"assistant_model": copy.deepcopy(model())},
    "noisy": lambda: {"assistant_model": noisy_copy()},
    "early exit": lambda: {"assistant_early_exit": 2},
}


@pytest.mark.parametrize("guess", GUESSES)
def test_guessed_tokens_change_no_answer(guess):
    repeated = "你好你好你好，请说你好你好你好"  # something for the lookup to find
    for prompt in [*PROMPTS, repeated]:
        inputs = tokenizer()([prompt], return_tensors="pt")
        want = fresh_model().generate(**inputs, **GREEDY)
        assert fresh_model().generate(**inputs, **GREEDY, **GUESSES[guess]()).tolist() == want.tolist()


def test_guessed_tokens_change_no_answer_with_positions_of_ones_own():
    inputs = tokenizer()([PROMPTS[1]], return_tensors="pt")
    positions = make_position_ids(inputs["input_ids"], model().config) * torch.tensor([[40], [1]])
    want = model().generate(**inputs, **GREEDY, position_ids=positions)
    assert want.tolist() != model().generate(**inputs, **GREEDY).tolist(), "these positions change nothing"
    assert model().generate(**inputs, **GREEDY, position_ids=positions, use_cache=False).tolist() == want.tolist()
    for guess in ("lookup 7", "noisy"):
        got = model().generate(**inputs, **GREEDY, position_ids=positions, **GUESSES[guess]())
        assert got.tolist() == want.tolist()


def test_beams_with_positions_of_ones_own():
    inputs = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 12}
    positions = make_position_ids(inputs["input_ids"], model().config, inputs["attention_mask"])
    want = model().generate(**inputs, **beams)
    assert model().generate(**inputs, **beams, position_ids=positions).tolist() == want.tolist()


# Steps of any size -------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Ids and mask of prompts and answers; padding left, right and in between, one hole or two, a second <sop>."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(6, 14))
    text = st.lists(st.integers(4, 2600), min_size=length, max_size=length)
    ids = torch.tensor([draw(text) for _ in range(rows)])
    context = draw(st.integers(2, length - 3))
    ids[:, context], ids[:, context - 1] = SOP, draw(st.sampled_from([GMASK, MASK]))
    for row in range(rows):
        if draw(st.booleans()):
            ids[row, draw(st.integers(0, context - 2))] = draw(st.sampled_from([GMASK, MASK]))
        if draw(st.booleans()):
            ids[row, draw(st.integers(context + 1, length - 1))] = SOP
    padded = [draw(st.sets(st.integers(0, max(0, context - 2)), max_size=context - 1)) for _ in range(rows)]
    mask = torch.ones_like(ids)
    for row, columns in enumerate(padded):
        mask[row, list(columns)] = 0
        keep = (ids[row] == GMASK) | (ids[row] == MASK) | (ids[row] == SOP)
        mask[row, keep] = 1
    return ids, mask, context


@settings(max_examples=60, deadline=None)
@given(batches(), st.data())
def test_any_cut_of_an_answer_gives_the_logits_of_one_pass(batch, data):
    ids, mask, context = batch
    whole = model()(ids, attention_mask=mask).logits
    length, at, cache, got = ids.shape[1], 0, None, []
    stops = sorted({context + 1, length, *data.draw(st.lists(st.integers(context + 1, length), max_size=3))})
    for stop in stops:
        out = model()(
            ids[:, at:stop], all_ids=ids[:, :stop], attention_mask=mask[:, :stop], use_cache=True, past_key_values=cache
        )
        got.append(out.logits)
        cache, at = out[CACHE_NAME], stop
    real = mask == 1
    torch.testing.assert_close(torch.cat(got, 1)[real], whole[real], atol=2e-4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_positions_and_mask_equal_their_definition_token_by_token(batch):
    ids, mask, _ = batch
    positions, visible = make_position_ids(ids, model().config, mask), make_visible(ids, model().config, mask)[:, 0]
    for row, (tokens, real) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        context = tokens.index(SOP)
        hole = tokens.index(GMASK) if GMASK in tokens else tokens.index(MASK)
        for at in range(len(tokens)):
            place = hole if at >= context else at
            want = [max(0, sum(real[: place + 1]) - 1), max(0, at - context + 1)]
            assert positions[row, :, at].tolist() == want
            for other in range(len(tokens)):
                sees = other <= at or other < context
                assert bool(visible[row, at, other]) == (sees and real[at] == real[other] == 1)


def test_padding_in_the_middle_is_as_good_as_none():
    ids = torch.tensor([[5, 256, GMASK, SOP, 9, 12]])
    gap = torch.tensor([[5, 7, 7, 256, GMASK, SOP, 9, 12]])
    mask = torch.tensor([[1, 0, 0, 1, 1, 1, 1, 1]])
    got = model()(gap, attention_mask=mask).logits[mask == 1]
    torch.testing.assert_close(got, model()(ids).logits[0], atol=1e-4, rtol=0)


def test_static_cache_takes_several_tokens_at_once():
    ids = tokenizer()([PROMPTS[1]], ["早点睡。"], return_tensors="pt")["input_ids"]
    cut = ids[0].tolist().index(SOP) + 1
    static = StaticCache(config=model().config, max_cache_len=ids.shape[1] + 5)
    first = model()(ids[:, :cut], past_key_values=static, use_cache=True).logits
    rest = model()(ids[:, cut:], all_ids=ids, past_key_values=static, use_cache=True).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), model()(ids).logits, atol=1e-4, rtol=0)


def test_continued_positions_are_the_derived_ones():
    ids = torch.tensor([[5, 256, GMASK, SOP, 9, 12, 7]])
    whole = make_position_ids(ids, model().config)
    for prompt in range(4, 8):
        assert torch.equal(continued_positions(whole[..., :prompt], 7), whole)


# Refused -----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_not_read_in_pieces():
    inputs = tokenizer()([PROMPTS[1]], return_tensors="pt")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model().generate(**inputs, **GREEDY, prefill_chunk_size=4)


def test_a_mask_longer_than_the_keys_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 9\]: at most 4 columns"):
        model()(torch.tensor([[5, 256, GMASK, SOP]]), attention_mask=torch.ones(1, 9))
