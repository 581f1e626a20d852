"""What is seen of sizes: numbers that remember where they come from, and maps that follow the image."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import compare, images
from kind_models import Classifier, TripledWhenUnusedIsLong, lively
from library_models import timm_vit
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite.capture import capture, other_looks, training_look
from attnrewrite.capture.size_terms import Arithmetic, Side
from attnrewrite.errors import ConversionError
from attnrewrite.ir.image_map import ImageMap, ImageSize


class Arranged(nn.Module):
    """Does one thing with the sides of its image."""

    def __init__(self, does):
        super().__init__()
        self.does, self.weight = does, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.does(x, *x.shape[-2:]) * self.weight


def value(term):
    if isinstance(term, Side):
        return term.extent
    return term.function(*map(value, term.operands)) if isinstance(term, Arithmetic) else term


@pytest.mark.parametrize(
    "number",
    [
        lambda h, w: h // 4 * w,
        lambda h, w: -h % 7,
        lambda h, w: (7 - h % 7) % 7 + w,
        lambda h, w: math.ceil(h / 3) + math.floor(w / 2),
        lambda h, w: divmod(h, 5)[0] + 1,
        lambda h, w: round(h**0.5),
        lambda h, w: 2 * abs(h - w) + 1,
    ],
)
def test_arithmetic_on_sizes_is_known_to_come_from_them(number):
    seen = capture(Arranged(lambda x, h, w: x.new_ones(number(h, w))), torch.randn(1, 3, 22, 31))
    made = next(node for node in seen.graph.nodes if "new_ones" in str(node.target))
    ((term,),) = seen.sizes.given_at(seen.position[made]).terms_of([made.args[1][0]])
    assert value(term) == number(22, 31) == made.args[1][0]
    other = capture(Arranged(lambda x, h, w: x.new_ones(number(h, w))), torch.randn(1, 3, 40, 17))
    ((later,),) = other.sizes.given[-1].terms_of([number(40, 17)])
    assert value(later) == number(40, 17)


@pytest.mark.parametrize(
    ("condition", "outcome"),
    [
        (lambda h, w: h > 20, True),
        (lambda h, w: h <= 20, False),
        (lambda h, w: h == w, False),
        (lambda h, w: h % 2, False),
        (lambda h, w: (h, w) == (22, 30), False),
    ],
)
def test_branches_on_sizes_are_known(condition, outcome):
    seen = capture(Arranged(lambda x, h, w: x * 2 if condition(h, w) else x), torch.randn(1, 3, 22, 31))
    assert seen.sizes.decisions[-1].outcome is outcome
    assert seen.sizes.decisions[-1].place[0] == __file__


@pytest.mark.parametrize("limit", [8, 250], ids=["met by other looks", "met by none"])
def test_a_branch_on_the_size_of_what_nothing_else_uses_is_guarded(limit):
    """The exported graph has neither the branch nor the value."""
    attention = TripledWhenUnusedIsLong()
    attention.limit = limit
    donor = lively(lambda: Classifier(attention))
    converted = attnrewrite.convert(donor, "identity", images(1, (16, 16)), progress=False)
    for size in ((16, 16), (16, 12), (128, 64)):
        assert compare(converted, donor, images(2, size), False, gradient=False)[0] in ("equal", "refused")
    assert compare(converted, donor, images(2, (16, 16)), False, gradient=False)[0] == "equal"


def test_a_tracked_size_is_a_plain_number_to_everybody_else():
    kept = []
    model = Arranged(lambda x, h, w: kept.extend([h, w]) or x.flatten(2)[..., : h * w].view(x.shape[0], -1, h, w))
    capture(model, torch.randn(1, 3, 22, 31))
    height, width = kept
    assert {height: "found"}[22] == "found"
    assert (f"{height}", repr(width), int(height) + 1, list(range(width))[-1]) == ("22", "31", 23, 30)
    assert type(copy.deepcopy(height)) is type(pickle.loads(pickle.dumps(height))) is int
    assert torch.zeros(height, width).shape == (22, 31)


def test_looks_differ_in_size_aspect_and_batch():
    first = capture(timm_vit().eval(), torch.randn(1, 3, 32, 32))
    shapes = [tuple(look.tensors[look.inputs[0]].shape) for look in (first, *other_looks(first))]
    assert len(shapes) == 4
    assert len({shape[0] for shape in shapes}) == len({shape[2] / shape[3] for shape in shapes}) == 4
    patches = {(shape[2] // 4 % 4, shape[3] // 4 % 4) for shape in shapes}  # it takes whole patches of 4 alone
    assert patches == {(0, 0), (1, 3), (2, 2)}
    trained = training_look(first, first)
    assert trained.tensors[trained.inputs[0]].shape == first.tensors[first.inputs[0]].shape


def test_a_model_of_one_size_is_looked_at_in_other_batches_alone():
    first = capture(timm_vit(dynamic_img_size=False).eval(), torch.randn(1, 3, 32, 32))
    assert other_looks(first) == []
    model = timm_vit(dynamic_img_size=False).eval()
    converted = attnrewrite.convert(model, "identity", torch.randn(1, 3, 32, 32))
    batch = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(converted(batch), model(batch), rtol=1e-5, atol=1e-5)


def test_looking_leaves_no_trace_in_the_log(caplog, capfd):
    attnrewrite.convert(timm_vit(dynamic_img_size=False).eval(), "identity", torch.randn(1, 3, 32, 32), progress=False)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert "failed while attempting" not in capfd.readouterr().err


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    patch=st.sampled_from([2, 4, 8, 14, 16]),
    rounding=st.sampled_from(["down", "up"]),
    cells=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    rest=st.tuples(st.integers(0, 15), st.integers(0, 15)),
)
def test_the_map_of_an_image_is_found_from_others(patch, rounding, cells, rest):
    def mapped(image):
        return tuple(side // patch if rounding == "down" else -(-side // patch) for side in image)

    looks = ((14 * patch, 14 * patch), (16 * patch, 20 * patch), (18 * patch + 1, 15 * patch + patch // 2))
    size = ImageSize()
    follows = ImageMap(size, looks, tuple(map(mapped, looks)))
    image = tuple(cell * patch + extra % patch for cell, extra in zip(cells, rest, strict=True))
    size.note(image)
    height, width = mapped(image)
    found = follows.possible(height * width)
    assert (height, width) in found
    assert all(h * w == height * width for h, w in found)
    assert not follows.possible(height * width + 1) or (height, width) not in follows.possible(height * width + 1)


@pytest.fixture(scope="module")
def small_kernel():
    return with_small_kernel()


def with_small_kernel():
    torch.manual_seed(0)
    model = timm_vit().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8)
    return attnrewrite.convert(model, "neighborhood", torch.randn(1, 3, 32, 32), kernel_size=3)


WIDE, TALL = torch.randn(1, 3, 16, 64), torch.randn(1, 3, 64, 16)


def alone(model, image):
    """The model's result in a process that has seen no other image."""
    with torch.no_grad():
        return copy.deepcopy(model)(image)


def test_maps_of_as_many_tokens_are_told_apart(small_kernel):
    turned = small_kernel(WIDE.transpose(2, 3).contiguous())
    assert not torch.allclose(small_kernel(WIDE), turned, atol=1e-4)
    torch.testing.assert_close(small_kernel(WIDE), alone(small_kernel, WIDE))


def test_threads_that_share_a_model_see_their_own_images(small_kernel):
    expected = {"wide": alone(small_kernel, WIDE), "tall": alone(small_kernel, TALL)}
    images, wrong, start = {"wide": WIDE, "tall": TALL}, [], threading.Barrier(2)

    def serve(name):
        start.wait()
        for _ in range(30):
            with torch.no_grad():
                if not torch.allclose(small_kernel(images[name]), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_that_run_again_in_a_backward_pass_take_the_map_of_their_image_or_say_so():
    model = with_small_kernel()

    def features(image):
        tokens = model._pos_embed(model.patch_embed(image))
        for block in model.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return tokens

    square, other = torch.randn(1, 3, 32, 32, requires_grad=True), torch.randn(1, 3, 32, 48, requires_grad=True)
    one, two = features(square).square().sum(), features(other).square().sum()
    (one + two).backward()
    for image in (square, other):
        plain = image.detach().requires_grad_()
        model.forward_features(plain)  # notes the image
        tokens = model._pos_embed(model.patch_embed(plain))
        for block in model.blocks:
            tokens = block(tokens)
        tokens.square().sum().backward()
        torch.testing.assert_close(image.grad, plain.grad, rtol=1e-4, atol=1e-5)
    both = features(WIDE.clone().requires_grad_()).sum() + features(TALL.clone().requires_grad_()).sum()
    with pytest.raises(ConversionError, match="more than one map"):
        both.backward()


def test_a_copy_in_another_process_follows_the_image_too(small_kernel):
    restored = pickle.loads(pickle.dumps(small_kernel))
    with torch.no_grad():
        torch.testing.assert_close(restored(WIDE), small_kernel(WIDE))
        torch.testing.assert_close(restored(TALL), small_kernel(TALL))


def test_a_compiled_model_follows_the_image(small_kernel):
    compiled = torch.compile(copy.deepcopy(small_kernel), backend="eager")
    with torch.no_grad():
        for image in (WIDE, TALL, torch.randn(2, 3, 32, 48)):
            torch.testing.assert_close(compiled(image), small_kernel(image), rtol=1e-4, atol=1e-5)
