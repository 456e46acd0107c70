"""Rotations preserve the logits if they can be computed offline, and are refused otherwise."""

import pytest
import torch

from lmpress.calibrate.model.architecture import find_blocks, set_weight, weight_of
from lmpress.compress.block import Block, BlockContext
from lmpress.compress.methods.quantize.rtn import round_to_nearest
from lmpress.compress.methods.transform.rotate import Rotate, apply, apply_outside, apply_rotation, stream_rotation
from lmpress.errors import CompressError
from lmpress.recipes.scheme import QuantArgs, Scheme

ROTATABLE = ["llama", "qwen2", "qwen3", "mistral", "phi3", "phi", "gpt2", "opt", "gpt_neox", "falcon", "mixtral"]
W4 = Scheme(QuantArgs(bits=4, group_size=16))


def hollow(model):
    """A copy of the model with its blocks replaced by the identity, sharing the parameters outside them."""
    blocks = find_blocks(model)[1]
    as_tuple = model.config.model_type in ("bloom", "falcon")
    for block in blocks:
        block.forward = lambda hidden, *args, **kwargs: (hidden,) if as_tuple else hidden
    return blocks


def untie(model):
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def rotate_model(model, record, ids, config=None):
    """Rotate the blocks and the model around them, as a run does."""
    config = config or Rotate()
    untie(model)
    for index in range(len(find_blocks(model)[1])):
        module, call, hidden = record(model, index)
        block = Block(
            f"blocks.{index}", module, [], BlockContext(lambda: iter(()), (call, torch.randn_like(hidden)), {}, 8)
        )
        apply(config, block)
    blocks = hollow(model)
    try:
        return apply_outside(config, model, ids)
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize("name", ROTATABLE)
@torch.no_grad()
def test_logits_are_those_of_the_original(make_model, record, random_ids, name):
    model = make_model(name)
    expected = model(random_ids, use_cache=False).logits
    before = {n: p.clone() for n, p in model.named_parameters()}
    rotate_model(model, record, random_ids)
    logits = model(random_ids, use_cache=False).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and torch.equal(p, before.get(n, p + 1))]
    assert matrices == []  # every linear and embedding on the stream was rotated


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_norms_before_the_residual_addition_are_refused(make_model, record, random_ids, name):
    with pytest.raises(CompressError, match=r"blocks\.0 does not compute the same"):
        rotate_model(make_model(name), record, random_ids)


def test_a_norm_after_the_embedding_is_refused(make_model, record, random_ids):
    with pytest.raises(CompressError, match="Bloom"):
        rotate_model(make_model("bloom"), record, random_ids)


@torch.no_grad()
def test_norms_are_left_without_gain(make_model, record, random_ids):
    model = make_model("llama")
    _, changed = rotate_model(model, record, random_ids)
    assert all(p.eq(1).all() for n, p in model.named_parameters() if "norm" in n)
    assert changed == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@torch.no_grad()
def test_a_rotated_block_rotates_the_stream(make_model, prepare, output):
    block = prepare(make_model("llama"), W4)
    expected = output(block)
    apply(Rotate(), block)
    rotation = stream_rotation(32, 0, False)
    rotated = torch.cat([c.replay(block.module, apply_rotation(h, rotation)) for c, h, _ in block.context.samples()])
    torch.testing.assert_close(rotated, apply_rotation(expected, rotation), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rotation_lowers_the_rounding_error_of_outlier_channels(make_model, prepare):
    def error(rotate):
        block = prepare(
            make_model("llama"), Scheme(QuantArgs(bits=4, strategy="channel", group_size=None)), outliers=(3, 17)
        )
        rotation = stream_rotation(32, 0, False) if rotate else torch.eye(32, dtype=torch.float64)
        expected = torch.cat(
            [apply_rotation(c.replay(block.module, h), rotation) for c, h, _ in block.context.samples()]
        )
        if rotate:
            apply(Rotate(), block)
        for name, linear in block.local().items():
            module = block.module.get_submodule(name)
            set_weight(module, round_to_nearest(weight_of(module), linear.args).dequantize())
        found = torch.cat([c.replay(block.module, apply_rotation(h, rotation)) for c, h, _ in block.context.samples()])
        return float((found - expected).square().mean())

    assert error(rotate=True) < error(rotate=False)
