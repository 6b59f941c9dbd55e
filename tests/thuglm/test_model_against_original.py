"""The model against what the published one computed (tests/reference, whose README gives the tolerances)."""

import pytest
import torch

from tests.helpers.reference import CHECKPOINT, fresh_model, generation_cases, logit_cases, model, tensors, tokenizer
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from thuglm.modeling_chatglm import ALPHA, CACHE_NAME, ChatGLMRotaryEmbedding
from thuglm.prefix_mask import make_position_ids, make_visible
from thuglm.prompt import chat_prompt, process_response

CASES = logit_cases()
FLOAT32 = [name for name, case in CASES.items() if case["model_dtype"] == "float32"]
# float16 kernels differ from one another; half of the distance that float16 itself has from float32 in these cases.
TOLERANCE = {"float32": (3e-4, 1e-4, 5e-4, 1e-5), "float16": (0.1, 0.06, None, 0.01)}


def run(name: str, **extra):
    case, data = CASES[name], tensors(name)
    given = {key: data[key] for key in case["passed_to_model"]}
    net = extra.pop("net", None) or model(getattr(torch, case["model_dtype"]))
    return net(input_ids=data["input_ids"], **given, **extra)


def real_positions(case, shape):
    """Boolean [B, L]: where outputs mean something."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if case["real_positions"] == "all" or isinstance(case["real_positions"], str):
        return ~mask
    for row, positions in enumerate(case["real_positions"]):
        mask[row, positions] = True
    return mask


@pytest.mark.parametrize("name", CASES)
def test_against_original_forward(name):
    case, data = CASES[name], tensors(name)
    atol_logits, atol_final, atol_hidden, atol_loss = TOLERANCE[case["model_dtype"]]
    out = run(name, output_hidden_states=True)
    real = real_positions(case, data["input_ids"].shape)
    logits = out.logits.float()
    if "logits" in data:
        torch.testing.assert_close(logits[real], data["logits"][real], atol=atol_logits, rtol=0)
    if "logits_at" in data:
        rows, positions = data["logits_at_index"].T
        torch.testing.assert_close(logits[rows, positions], data["logits_at"], atol=atol_logits, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1)[real], data["logits_lse"][real], atol=atol_logits, rtol=0)
    if case["model_dtype"] == "float32":
        assert torch.equal(logits.argmax(-1)[real], data["logits_argmax"][real])
    if "final_hidden" in data:
        final = out.hidden_states[-1].float()
        torch.testing.assert_close(final[real], data["final_hidden"][real], atol=atol_final, rtol=0)
    if "hidden_states" in data:
        assert len(out.hidden_states) == len(data["hidden_states"])
        for got, want in zip(out.hidden_states, data["hidden_states"], strict=True):
            torch.testing.assert_close(got[real], want[real], atol=atol_hidden, rtol=0)
    if "loss" in data:
        assert out.loss.item() == pytest.approx(data["loss"].item(), abs=atol_loss)


@pytest.mark.parametrize("name", [name for name in FLOAT32 if "position_ids" not in CASES[name]["passed_to_model"]])
def test_against_original_mask_and_positions(name):
    data, config = tensors(name), model().config
    assert torch.equal(make_position_ids(data["input_ids"], config), data["position_ids"])
    if "attention_mask" in data:
        assert torch.equal(~make_visible(data["input_ids"], config), data["attention_mask"])


@pytest.mark.parametrize("name", [name for name in FLOAT32 if "grad_norms" in CASES[name]])
def test_against_original_gradients(name):
    case, data, net = CASES[name], tensors(name), fresh_model()
    run(name, net=net).loss.backward()
    grads = {key: value.grad for key, value in net.named_parameters()}
    for key, norm in case["grad_norms"].items():
        assert grads[key].norm().item() == pytest.approx(norm, rel=1e-4), key
    for key, want in data.items():
        kind, _, parameter = key.partition(".")
        if kind == "grad":
            torch.testing.assert_close(grads[parameter], want, atol=1e-4 * want.abs().max().item(), rtol=0)
        elif kind == "grad_sample":
            rows, columns = data[f"grad_sample_index.{parameter}"].T
            limit = 1e-4 * grads[parameter].abs().max().item()
            torch.testing.assert_close(grads[parameter][rows, columns], want, atol=limit, rtol=0)
        elif kind == "grad_row_norm":
            limit = 1e-4 * want.max().item()
            torch.testing.assert_close(grads[parameter].norm(dim=1), want, atol=limit, rtol=0)


def test_against_original_left_padding_from_the_2d_mask_alone():
    """Case c passes the full mask and the positions; here they come from the 2-D mask that our tokenizer returns."""
    case, data = CASES["c_left_padded"], tensors("c_left_padded")
    mask = torch.ones_like(data["input_ids"])
    for row, first in enumerate(case["first_real"]):
        mask[row, :first] = 0
    logits = model()(input_ids=data["input_ids"], attention_mask=mask).logits
    rows, positions = data["logits_at_index"].T
    torch.testing.assert_close(logits[rows, positions], data["logits_at"], atol=3e-4, rtol=0)


def test_against_original_attention_weights():
    data = tensors("a_single")
    net = fresh_model(attn_implementation="eager")
    out = net(input_ids=data["input_ids"], output_attentions=True)
    torch.testing.assert_close(out.attentions[0][0], data["attn_probs_first"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.attentions[-1][0], data["attn_probs_last"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logits, data["logits"], atol=3e-4, rtol=0)


def test_against_original_cached_steps():
    data, prompt = tensors("g_steps"), torch.tensor([CASES["g_steps"]["prompt_ids"]])
    out = model()(input_ids=prompt, use_cache=True)
    torch.testing.assert_close(out.logits[0, -1], data["step_logits"][0].reshape(-1), atol=3e-4, rtol=0)
    # The original keeps [L, B, heads, head_dim], transformers' caches [B, heads, L, head_dim].
    for layer, which in ((0, "layer0"), (-1, "last")):
        cached = out[CACHE_NAME].layers[layer]
        for got, kind in ((cached.keys, "key"), (cached.values, "value")):
            want = data[f"past0_{kind}_{which}"].permute(1, 2, 0, 3)
            torch.testing.assert_close(got[:, :, : want.shape[2]], want, atol=1e-4, rtol=0)
    for step, (token, position) in enumerate(zip(data["step_input_ids"], data["step_position_ids"], strict=True), 1):
        out = model()(
            input_ids=token.reshape(1, 1),
            position_ids=position.reshape(1, 2, 1),
            past_key_values=out[CACHE_NAME],
            use_cache=True,
        )
        torch.testing.assert_close(out.logits[0, -1], data["step_logits"][step].reshape(-1), atol=3e-4, rtol=0)


# Generation --------------------------------------------------------------------------------------------------------


def new_ids(inputs, **settings):
    settings = {"do_sample": False, "max_new_tokens": 24, **settings}
    return model().generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def trimmed(ids):
    """Without the padding behind <eop>; the original fills a finished batch up to the longest row."""
    return ids[: ids.index(2661) + 1] if 2661 in ids else ids


@pytest.mark.parametrize("case", generation_cases()["greedy_single"], ids=lambda case: case["prompt"][:12])
def test_against_original_greedy(case):
    inputs = tokenizer()([case["prompt"]], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == case["input_ids"]
    (ids,) = new_ids(inputs)
    assert trimmed(ids) == trimmed(case["new_ids"])
    assert tokenizer().decode(ids) == case["text"]


def test_against_original_greedy_batch():
    case = generation_cases()["greedy_batch"]
    inputs = tokenizer()(case["prompts"], return_tensors="pt", padding=True)
    assert inputs["input_ids"].tolist() == case["input_ids"]
    assert new_ids(inputs) == case["new_ids"]


@pytest.mark.parametrize("case", generation_cases()["beam"], ids=lambda case: case["prompt"][:12])
def test_against_original_beam(case):
    inputs = tokenizer()([case["prompt"]], return_tensors="pt")
    settings = {key: case[key] for key in ("num_beams", "num_return_sequences")}
    got = new_ids(inputs, **settings)
    assert [trimmed(ids) for ids in got] == [trimmed(ids) for ids in case["new_ids"]]


def test_against_original_beam_batch():
    case = generation_cases()["beam_batch"]
    inputs = tokenizer()(case["prompts"], return_tensors="pt", padding=True)
    got = new_ids(inputs, num_beams=case["num_beams"])
    assert [trimmed(ids) for ids in got] == [trimmed(ids) for ids in case["new_ids"]]


@pytest.mark.parametrize("case", generation_cases()["chat_prompts"], ids=lambda case: f"{len(case['history'])} turns")
def test_against_original_chat(case):
    assert chat_prompt(case["query"], case["history"]) == case["prompt"]
    history = [tuple(turn) for turn in case["history"]]
    response, after = model().chat(
        tokenizer(), case["query"], history, do_sample=False, max_new_tokens=case["greedy_max_new_tokens"]
    )
    assert response == case["response"]
    assert [list(turn) for turn in after] == case["new_history"]
    assert history == [tuple(turn) for turn in case["history"]], "the caller's list must not change"


def test_against_original_stream_chat():
    case = generation_cases()["stream_chat_greedy"]
    prompt = tokenizer().encode(chat_prompt(case["query"], case["history"]))
    stream = model().stream_chat(
        tokenizer(),
        case["query"],
        case["history"],
        do_sample=False,
        max_length=len(prompt) + case["max_length_minus_prompt"],
    )
    responses = [response for response, _ in stream]
    # The original yields once per token; equal neighbours were recorded once.
    kept = [text for i, text in enumerate(responses) if i == 0 or text != responses[i - 1]]
    assert kept == case["yielded_responses"] or responses == case["yielded_responses"]


@pytest.mark.parametrize("case", generation_cases()["process_response"], ids=lambda case: repr(case["in"][:16]))
def test_against_original_process_response(case):
    assert process_response(case["in"]) == case["out"]
    assert model().process_response(case["in"]) == case["out"]


# The three traps ---------------------------------------------------------------------------------------------------


def test_trap_alpha_does_not_follow_the_number_of_layers(monkeypatch):
    assert pytest.approx(56**0.5) == ALPHA
    import thuglm.modeling_chatglm as modeling

    monkeypatch.setattr(modeling, "ALPHA", (2 * model().config.num_layers) ** 0.5)
    wrong = (run("a_single").logits - tensors("a_single")["logits"]).abs().max()
    assert wrong > 1, "the golden case would not notice an ALPHA that follows num_layers"


def test_trap_rotary_frequencies_are_rounded_to_float16():
    config = model().config
    rotary = ChatGLMRotaryEmbedding(config)
    exact = 1.0 / 10000 ** (torch.arange(0, config.head_dim // 2, 2) / (config.head_dim // 2))
    assert torch.equal(rotary.inv_freq, exact.half().float())
    assert not torch.equal(rotary.inv_freq, exact)
    net = fresh_model()
    net.transformer.rotary_emb.inv_freq.copy_(exact)
    assert (run("e2_long_block", net=net).logits[0, -1] - run("e2_long_block").logits[0, -1]).abs().max() > 1e-2


def test_trap_stored_frequencies_are_ignored(tmp_path):
    """The shards hold rotary_emb.inv_freq; a file with other values there must load to the same model."""
    import shutil

    shutil.copytree(CHECKPOINT, tmp_path / "altered")
    changed = 0
    for shard in (tmp_path / "altered").glob("*.bin"):
        state = torch.load(shard, weights_only=True)
        for name in state:
            if "inv_freq" in name:
                state[name] = torch.full_like(state[name], 7.0)
                changed += 1
        torch.save(state, shard)
    assert changed == model().config.num_layers
    altered = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "altered", dtype=torch.float32)
    data = tensors("a_single")
    assert torch.equal(altered(input_ids=data["input_ids"]).logits, run("a_single").logits)


def test_trap_the_stored_head_is_ignored(tmp_path):
    """`lm_head.weight` of the file differs: the embedding wins, as after the original's from_pretrained."""
    import shutil

    shutil.copytree(CHECKPOINT, tmp_path / "altered")
    shard = tmp_path / "altered" / "pytorch_model-00008-of-00008.bin"
    torch.save({"lm_head.weight": torch.load(shard, weights_only=True)["lm_head.weight"] + 1}, shard)
    altered = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "altered", dtype=torch.float32)
    assert altered.lm_head.weight is altered.transformer.word_embeddings.weight
    assert torch.equal(altered.lm_head.weight, model().lm_head.weight)


def test_released_shape_is_the_default():
    config = ChatGLMConfig()
    with torch.device("meta"):
        net = ChatGLMForConditionalGeneration(config)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    assert sum(sizes.values()) in (6_173_286_400, 6_173_286_400 + 130528 * 4096)
    assert sum(n for name, n in sizes.items() if ".layers.0." in name) == 201_379_840
