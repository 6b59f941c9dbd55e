"""The roads of transformers' `generate`, beside answers that are made by hand: a whole forward pass for each token."""

import pytest
import torch

from tests.helpers.reference import fresh_model, model, tokenizer
from tests.helpers.tiny_models import PROMPTS
from thuglm.modeling_chatglm import CACHE_NAME

NEW = 7
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


def prompts(count=3):
    return dict(tokenizer()(PROMPTS[:count], return_tensors="pt", padding=True))


@torch.no_grad()
def by_hand(inputs, new=NEW):
    """Greedy ids [B, P + new], and the logits of each new token [B, new, V]."""
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(new):
        logits.append(model()(ids, attention_mask=mask, use_cache=False).logits[:, -1])
        allowed = logits[-1].clone()
        allowed[:, list(model().config.ends)] = -torch.inf
        ids = torch.cat((ids, allowed.argmax(-1, keepdim=True)), dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids, torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 1, "num_return_sequences": 1, "renormalize_logits": True},
        {"stop_strings": ["never written"], "tokenizer": tokenizer},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"logits_to_keep": 3},
    ],
    ids=lambda how: " ".join(how) or "plain",
)
def test_every_road_gives_the_greedy_answer(how):
    how = {name: value() if callable(value) else value for name, value in how.items()}
    got = model().generate(**prompts(), **GREEDY, **how)
    assert torch.equal(getattr(got, "sequences", got), by_hand(prompts())[0])


@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"assistant_early_exit": 1}], ids=str
)
def test_guesses_change_no_answer(how):
    if how.pop("assistant", None):
        torch.manual_seed(0)
        how["assistant_model"] = fresh_model()
        for weight in how["assistant_model"].parameters():
            weight.data += 0.003 * torch.randn_like(weight)
    for number in range(3):
        inputs = dict(tokenizer()([PROMPTS[number]], return_tensors="pt"))
        got = model().generate(**inputs, do_sample=False, max_new_tokens=NEW, **how)
        want = model().generate(**inputs, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(got, want)


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_a_dictionary_of_results_holds(use_cache):
    ask = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    net = fresh_model(attn_implementation="eager")
    got = net.generate(**prompts(), **GREEDY, **ask, return_dict_in_generate=True, use_cache=use_cache)
    ids, logits = by_hand(prompts())
    assert torch.equal(got.sequences, ids)
    torch.testing.assert_close(torch.stack(got.logits, dim=1), logits, atol=1e-4, rtol=0)
    config, start = net.config, prompts()["input_ids"].shape[1]
    for step, (hidden, attention) in enumerate(zip(got.hidden_states, got.attentions, strict=True)):
        keys = start + step
        looks = 1 if use_cache and step else keys
        assert [tuple(layer.shape) for layer in hidden] == [(3, looks, config.hidden_size)] * (config.num_layers + 1)
        assert [tuple(x.shape) for x in attention] == [(3, config.num_attention_heads, looks, keys)] * config.num_layers


def test_an_answer_goes_on_where_another_ended():
    inputs = prompts(1)
    short = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    first = model().generate(**inputs, **short, return_dict_in_generate=True)
    ids = first.sequences
    for cache in ({CACHE_NAME: first[CACHE_NAME]}, {}):
        more = {"attention_mask": torch.ones_like(ids), **short, "max_new_tokens": 4, "min_new_tokens": 4}
        rest = model().generate(ids, **more, **cache)
        assert torch.equal(rest, by_hand(inputs)[0])


def test_samples_depend_on_the_seed_alone():
    draws = []
    for how in ({}, {}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        ask = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": NEW, "min_new_tokens": NEW}
        draws.append(model().generate(**prompts(2), **ask, **how))
        assert draws[-1].shape[0] == 8
    assert all(torch.equal(draws[0], other) for other in draws[1:])
    assert len({tuple(row) for row in draws[0].tolist()}) > 2


def test_the_score_of_a_beam_is_the_mean_of_its_tokens():
    inputs = prompts(1)
    ask = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    got = model().generate(**inputs, **GREEDY, **ask)
    start = inputs["input_ids"].shape[1]
    logits = model()(got.sequences, use_cache=False).logits[:, start - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, got.sequences[:, start:, None]).squeeze(-1)
    # As in the published days, the prompt counts in the length.
    torch.testing.assert_close(got.sequences_scores, chosen.sum(-1) / got.sequences.shape[1], atol=1e-4, rtol=0)
    assert got.sequences_scores.sort(descending=True).values.equal(got.sequences_scores)
