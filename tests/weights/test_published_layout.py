"""What the real files hold, computed from the config alone, against the published sizes and the reference shards."""

import torch

from glmhelpers.weights.layout import STALE_TOTAL, part_bytes, published_shards, stored_bytes, tensor_shapes
from glmhelpers.weights.loading import load_model
from glmhelpers.weights.manifest import read_manifest
from glmhelpers.weights.shards import read_entries
from tests.helpers.checkpoint_folder import FIRST, edit_shard
from thuglm import ChatGLMConfig, ChatGLMForConditionalGeneration


def test_layout_gives_the_published_sizes():
    files = read_manifest()["files"]
    shards = published_shards(ChatGLMConfig())
    assert len(shards) == 8
    for shard, (name, facts) in zip(
        shards, sorted((n, f) for n, f in files.items() if n.endswith(".bin")), strict=True
    ):
        directory = facts["size"] - sum(stored_bytes(*tensor) for tensor in shard.items())
        assert 280 * len(shard) < directory < 320 * len(shard) + 500, name


def test_layout_explains_the_stale_total_of_the_index():
    stored = sum(stored_bytes(*tensor) for tensor in tensor_shapes(ChatGLMConfig()).items())
    assert stored + 2 * 2 * (150528 - 130528) * 4096 == STALE_TOTAL


def test_layout_against_the_model():
    config = ChatGLMConfig(num_layers=2)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if not name.endswith("inv_freq")}
    assert shapes == {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    sizes = part_bytes(ChatGLMConfig())
    assert sum(sizes.values()) - sizes["lm_head"] == 2 * 6_173_286_400
    assert sizes["transformer.layers.27"] == 2 * 201_379_840


def test_layout_against_the_reference_shards(folder):
    stored = {name: entry.shape for path in folder.glob("*.bin") for name, entry in read_entries(path).items()}
    assert stored == tensor_shapes(ChatGLMConfig.from_pretrained(folder))


def test_float32_layernorms_as_published_become_the_asked_dtype(folder):
    name = "transformer.layers.0.input_layernorm.weight"
    exact = torch.linspace(0.9, 1.1, 64)
    edit_shard(folder / FIRST, **{name: exact})
    for dtype in (torch.float16, torch.float32):
        found = load_model(folder, dtype=dtype, progress=False).get_parameter(name)
        assert torch.equal(found, exact.to(dtype))
