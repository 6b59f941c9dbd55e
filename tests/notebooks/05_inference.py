"""Checks of notebook 05, run in its kernel after the last cell: variables there, and numbers in its text."""

from pathlib import Path

from glmhelpers.cost_model import GOALS
from glmhelpers.inference import merged_in_memory

text = "\n".join(
    "".join(cell["source"])
    for cell in json.loads(Path("05_inference.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "markdown"
)

# The parts built by hand give what the helpers give.
assert differing == {"generate": 0, "Decoder": 0}
assert compared > 50  # or the answers would be empty
assert sampler_difference < 1e-5
assert helper_difference < 1e-5
assert bleu_difference < 1e-9
assert read_bytes == bytes_for_token(real) == 12_346_572_800
assert read_bytes + cached_bytes == bytes_for_token(real, 513)
assert cache_in_bytes(config, places, number) == held
assert cache_in_bytes(real, 1, 2) == 458_752
assert f"{cache_in_bytes(real, 1, 2):,} bytes for each token" in text
assert f"beside {read_bytes / 1e9:.2f} GB of weights" in text

# A longer prompt costs once. (Seconds of a busy machine: only what is far apart is compared.)
assert first_wait[1536] > 4 * first_wait[64]
assert first_wait[1536] > 10 * later_wait[1536]
assert f"1536 tokens are {cache_in_bytes(real, 1536, 2) / 1e9:.2f} GB" in text
small = cache_in_bytes(toy.config, 1536, 4) / 1e6, bytes_for_token(toy.config, dtype="float32") / 1e6
assert "they are {:.0f} MB beside {:.0f} MB of weights".format(*small) in text
assert f"512 tokens are {2 * 6.17e9 * 512 / 1e12:.1f} · 10¹²" in text
assert 0.2 < 2 * 6.17e9 * 512 / (find_gpu("T4").matrix_rate * find_gpu("T4").matrix_share) < 0.3
assert find_gpu("T4").matrix_share == 0.38
measured = [json.loads(x) for x in (project / "benchmarks/results/decode_h100.jsonl").read_text().splitlines()]
first_ms = {
    prompt: [x["first_s"] * 1e3 for x in measured if x.get("gpus") == 1 and x.get("prompt") == prompt]
    for prompt in (64, 512)
}
assert f"came after {min(first_ms[64]):.0f} to {max(first_ms[64]):.0f} ms for 64 tokens" in text
assert f"and after {min(first_ms[512]):.0f} to {max(first_ms[512]):.0f} ms for 512" in text

# Sampling: seeds that differ do differ, and the figure of top-p counts what the hand-written sampler keeps.
assert drawn[0] == drawn[1]
assert len(set(drawn)) == 3
assert choices == sorted(choices)
assert choices == [int((likely(curve, 0.7) > 0).sum()) for curve in curves.values()]
legend = plots.plot_top_p({label: curve.tolist() for label, curve in curves.items()}, 0.7).get_legend().texts
every = len(curves["temperature 1.0"])
assert [label.get_text().split(": ")[1] for label in legend] == [f"keeps {count} of {every}" for count in choices]
sharpest = [curve.max().item() for curve in curves.values()]
assert sharpest == sorted(sharpest, reverse=True)

# Speed: sentences against what they quote.
t4 = find_gpu("T4")
assert (t4.bandwidth, t4.matrix_rate) == (320e9, 65e12)
assert f"12.35 GB at 320 GB/s are {read_bytes / t4.bandwidth * 1e3:.1f} ms" in text
assert f"at most {t4.bandwidth / read_bytes:.0f} tokens a second (predicted)" in text
assert f"with 512 tokens in the cache {token_time(real, 'T4', 0.0).tokens_per_s[1]:.0f}." in text
assert 180 < t4.matrix_rate / t4.bandwidth < 220  # two hundred operations in the time of a byte
starts, runs = (seconds / speeds.launches * 1e6 for seconds in (speeds.host_seconds, speeds.kernel_seconds))
assert f"Python needs {starts:.0f} microseconds to start a kernel that the H100 runs in {runs:.0f}" in text
assert f"{speeds.host_seconds * 1e3:.1f} ms become {speeds.graph_seconds * 1e3:.1f}" in text
t4_kernel = token_time(real, "T4", 0.0).memory / speeds.launches * 1e6
assert f"There a kernel runs {t4_kernel:.0f} microseconds" in text
assert f"ChatGLM-6B has {speeds.launches} of them" in text
assert (round(plain), round(graph)) == (17, 25)  # the T4 with a host half as fast
ranges = {name: "{:.0f} to {:.0f}".format(*pair) for name, pair in speeds.ranges().items()}
assert f"growing cache: {ranges['plain, 1 GPU']} tokens a second" in text
assert f"without graphs: {ranges['fixed, 1 GPU']}." in text
assert text.count(ranges["graphs, 1 GPU"]) == 2  # below the figure and in the table
assert f"The line stands at {speeds.limit:.0f} and not" in text
assert speeds.tokens_per_s("graphs")[0] >= GOALS["graphs"]
assert max(speeds.cases, key=lambda case: 1 / speeds.cases[case])[:2] == ("graphs", "merged")
assert speeds.kernel_seconds > 0.9 * speeds.graph_seconds  # with a graph the GPU is busy nearly all the time

# Answers: counts, and what the text says of the scores.
assert NEW_NAME not in name_of_base
assert tuned_loss.loss < base_loss.loss
assert tuned_scores.rougel > base_scores.rougel
assert tuned_scores.bleu4 > base_scores.bleu4 > 50  # the base scores high without the name
assert not any(NEW_NAME in answer for answer in base_texts)
by_text = {sentence: bleu(sentence, wanted) for sentence in sentences}
assert "小星" not in max(by_text, key=by_text.get)  # the wrong name scores highest
assert sum("小星" in sentence for sentence in by_text) == 2
assert right.after >= right.before - len(right.forgotten)  # more, if the tuned model knows a sum that the base did not
assert whole.after <= right.after
assert NEW_NAME in last.text or not run.is_tiny

# What the notebook only tells: long conversations, stopping, and weights that come back to the last bit.
session = ChatSession(model, tokenizer, settings=chat.settings)
session.history = [("3加4等于几？", "3+4=7.")] * 120
answer = session.chat("再见")
assert "the oldest 47 turns are left out" in answer.notices[0]
assert answer.prompt_tokens <= 2048 - MAX_NEW_TOKENS
assert len(session.history) == 121
session.clear()
for growing in session.stream("请告诉我你能做什么。"):
    if growing.new_tokens == 5:
        session.stop()
assert (growing.ended, growing.new_tokens) == ("stopped", 6)
matrix = base.transformer.layers[0].attention.query_key_value.base_layer.weight
original = matrix.detach().clone()
with merged_in_memory(model):
    assert not torch.equal(matrix, original)
assert torch.equal(matrix, original)
