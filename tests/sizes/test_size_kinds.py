"""Every known way in which a model depends on its image's size, batch or mode, one test per kind, in several spellings.

What is converted at one size gives the donor's numbers at any other, or refuses with a ``ConversionError``.
"""

from __future__ import annotations

import functools
import itertools

import kind_maps as maps
import kind_models as kinds
import library_models as libraries
import pytest
from judging import TARGETS, compare, faults, images, judge, outputs, told
from kind_maps import LeavesTokensOut, Reduced, SetsSides, WindowsOnTokens
from kind_models import Classifier, GivesAMask, MasksItself, lively
from repetition import thinned

import attnrewrite
from attnrewrite.errors import AttnRewriteError, ConversionError

IDENTITY = {"identity": {}}
SIZES = [(8, 32), (24, 24), (32, 16), (16, 20), (32, 32)]
"""As many patches of 4 pixels as at 16x16 on another map, then other numbers of them."""

named = functools.partial(pytest.mark.parametrize, ids=lambda value: getattr(value, "__name__", str(value)))


def right_or_refused(make, captured=(16, 16), others=SIZES, targets=TARGETS):
    found = judge(lambda: lively(make), captured, others, targets)
    assert not any(finding.where == "donor" for finding in found), told("the donor fails at capture", found)
    assert not faults(found), told(f"captured at {captured[0]}x{captured[1]}:", faults(found))
    return found


def right(make, captured, others, targets=TARGETS):
    """At all sizes, batches and modes, with its attention converted."""
    found = judge(lambda: lively(make), captured, others, targets)
    wrong = [finding for finding in found if finding.verdict not in ("equal", "converted")]
    assert not wrong, told(f"captured at {captured[0]}x{captured[1]}:", wrong)
    assert all("attention" in finding.detail for finding in found if finding.verdict == "converted")


# --- numbers, positions and branches ---


def test_a_plain_model_runs_at_all_sizes():
    right(Classifier, (16, 16), SIZES, IDENTITY)


@pytest.mark.parametrize("inline", [False, True], ids=["beside", "inline"])
@named("model", kinds.POSITIONS_AND_NUMBERS)
def test_numbers_and_positions_outside_the_attention(model, inline):
    right_or_refused(lambda: model(inline=inline), targets=IDENTITY)
    right_or_refused(lambda: model(inline=inline), (24, 32), [(16, 16), (32, 24), (20, 20), (48, 16)], IDENTITY)


@named("attention", kinds.IN_ATTENTION)
def test_numbers_and_branches_in_the_attention(attention):
    right_or_refused(lambda: Classifier(attention()), targets=IDENTITY)


@named("attention", thinned(kinds.IN_ATTENTION, 2))
def test_numbers_and_branches_in_the_attention_of_a_large_map_seen_first(attention):
    """The branch that a small map does not take is the one captured."""
    right_or_refused(lambda: Classifier(attention()), (32, 32), [(16, 16), (16, 32), (24, 20)], IDENTITY)


def test_attention_along_rows_and_columns_runs_at_all_sizes():
    right(maps.RowsAndColumns, (16, 24), SIZES, IDENTITY)


def test_what_ties_a_module_to_its_size_does_not_tie_it_to_its_batch():
    found = right_or_refused(lambda: kinds.FlippedInParts(inline=True), (32, 24), SIZES, IDENTITY)
    same = [finding for finding in found if "captured size" in finding.where]
    assert same
    assert all(finding.verdict == "equal" for finding in same), told("at the captured size:", same)


def test_padding_of_timm_that_was_not_needed_at_capture():
    sizes = [(30, 30), (34, 34), (32, 30), (46, 40)]
    right_or_refused(functools.partial(libraries.timm_vit, dynamic_img_pad=True), (32, 32), sizes, IDENTITY)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("captured", [(64, 96), (50, 70)], ids=str)
def test_padding_of_transformers_swin(captured, target):
    sizes = [(62, 96), (50, 70), (64, 94), (60, 92), (72, 88)]
    right_or_refused(libraries.transformers_swin, captured, sizes, {target: TARGETS[target]})


# --- masks ---


@named("mask", kinds.MASKS)
def test_a_mask_that_the_attention_makes_from_its_size(mask):
    right_or_refused(lambda: Classifier(MasksItself(mask)), targets=IDENTITY)


@pytest.mark.parametrize("inline", [False, True], ids=["beside", "inline"])
@named("mask", kinds.MASKS)
def test_a_mask_that_the_model_makes_from_its_size_and_gives(mask, inline):
    right_or_refused(lambda: GivesAMask(mask, inline=inline), targets=IDENTITY)


# --- windows ---


@named("windows", maps.WINDOWS)
def test_windows_that_are_the_whole_map_at_capture(windows):
    right_or_refused(lambda: Classifier(windows()), others=[(32, 32), (16, 32), (48, 32), (24, 24), (8, 32)])


@named("windows", maps.WINDOWS)
def test_several_windows_at_capture_and_one_later(windows):
    right_or_refused(lambda: Classifier(windows()), captured=(32, 32), others=[(16, 16), (16, 32), (64, 16), (40, 24)])


@named("windows", maps.WINDOWS)
def test_windows_in_a_row_at_capture(windows):
    right_or_refused(lambda: Classifier(windows()), captured=(16, 32), others=[(32, 16), (32, 32), (16, 16), (16, 64)])


# --- maps of one cell ---


@pytest.mark.parametrize("captured", [(16, 16), (32, 32), (16, 32)], ids=str)
@pytest.mark.parametrize("how", ["convolution", "rows", "pooling", "adaptive pooling"])
def test_reduced_keys_of_one_cell_at_capture(how, captured):
    right_or_refused(lambda: Reduced(how), captured, [(16, 16), (32, 32), (64, 64), (32, 64), (16, 64)], IDENTITY)


@pytest.mark.parametrize("captured", [(4, 4), (4, 16), (16, 4)], ids=str)
def test_a_map_of_one_cell_or_one_row_at_capture(captured):
    right_or_refused(Classifier, captured, [(16, 16), (4, 16), (16, 4), (8, 24)], IDENTITY)


def test_a_pyramid_whose_last_maps_are_one_cell_at_capture():
    right_or_refused(libraries.timm_pvt, (32, 32), [(64, 64), (32, 64), (96, 64)], IDENTITY)


# --- tokens made maps ---


BACK = ["given", "divided", "counted", "inferred"]
SIDES_AND_BACK = [  # to and fro, so that every second pair covers all of both
    *itertools.product(["own"], BACK),
    *itertools.product(["root"], BACK[::-1]),
    *itertools.product(["exact root"], BACK),
    *itertools.product(["set before"], BACK[::-1]),
]


@pytest.mark.parametrize(("side", "back"), thinned(SIDES_AND_BACK, 2))
def test_tokens_made_a_map_of_sides_that_the_input_does_not_tell(side, back):
    model = SetsSides if side == "set before" else maps.Sequence
    right_or_refused(
        lambda: model(WindowsOnTokens(side, back), dim=12),
        captured=(32, 32),
        others=[(16, 64), (16, 16), (48, 48), (32, 64)],
    )


# --- training ---


@pytest.mark.parametrize("step", maps.IN_TRAINING, ids=lambda step: step.__name__)
def test_steps_of_training_only(step):
    right_or_refused(step, targets=IDENTITY)


@named("keep", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("how", ["chance", "largest", "every n-th"])
def test_tokens_left_out_in_training(how, keep):
    right_or_refused(lambda: LeavesTokensOut(how, keep), targets=IDENTITY)


SIZES_MATTER = {
    "neighborhood": {"kernel_size": 3},
    "manhattan": {"decay": 0.9},
    "aggregated": {},
    "long_short_distance": {},
    "conv_glu": {},
}


def refused_in_training(donor, target, batch):
    """At conversion, or at a training step; the tokens that are left make no map."""
    try:
        converted = attnrewrite.convert(donor, target, batch[:1], progress=False, **SIZES_MATTER[target])
    except ConversionError:
        return
    assert outputs(converted, batch)
    with pytest.raises(AttnRewriteError):
        converted.train()(batch)


@pytest.mark.parametrize(("rate", "target"), thinned(itertools.product([0.75, 0.5, 0.25], SIZES_MATTER), 3))
def test_tokens_that_timm_leaves_out_in_training_are_no_map(rate, target):
    donor = lively(lambda: libraries.timm_vit(img_size=64, patch_size=8, patch_drop_rate=rate))
    refused_in_training(donor, target, images(2, (64, 64)))


@pytest.mark.parametrize("target", SIZES_MATTER)
@pytest.mark.parametrize("how", ["chance", "largest", "every n-th"])
def test_tokens_that_a_model_leaves_out_in_training_are_no_map(how, target):
    refused_in_training(lively(lambda: LeavesTokensOut(how)), target, images(2, (16, 16)))


# --- kernels ---


@pytest.mark.parametrize("make", [libraries.timm_vit, Classifier, maps.Sequence], ids=lambda make: make.__name__)
def test_a_kernel_cut_to_the_map_at_capture_grows_again(make):
    """A kernel of 31 covers all of these maps, so that attention stays global."""
    sizes = [(48, 48), (64, 64), (32, 64), (120, 40)]
    right_or_refused(make, (32, 32), sizes, {"neighborhood": {"kernel_size": 31}})


@named(("make", "kernel"), thinned(itertools.product([libraries.timm_vit, Classifier], [10, 15]), 3))
def test_a_kernel_cut_at_capture_is_the_one_asked_for_at_a_larger_map(make, kernel):
    """The same model converted at the larger size tells what is right: no map of 8x8 bounds this kernel."""
    options = {"kernel_size": kernel, "progress": False}
    converted = attnrewrite.convert(lively(make), "neighborhood", images(1, (32, 32)), **options)
    found = {}
    for size in [(64, 64), (32, 64), (64, 32)]:
        expected = attnrewrite.convert(lively(make), "neighborhood", images(1, size), **options)
        found[size] = compare(converted, expected, images(2, size))
    assert all(verdict in ("equal", "refused") for verdict, _ in found.values()), found


@pytest.mark.parametrize("make", [libraries.timm_vit, Classifier], ids=lambda make: make.__name__)
def test_a_kernel_that_covers_no_more_than_the_map_at_capture_is_exact_there_alone(make):
    """Asked to keep the function, it may not leave keys out at a larger map."""
    sizes = [(48, 48), (64, 64), (32, 64)]
    right_or_refused(make, (32, 32), sizes, {"neighborhood": {"kernel_size": 9, "fidelity": "exact"}})


# --- what has to run ---


def test_a_window_that_is_one_side_or_the_other_or_neither():
    """transformers' Swin cuts its window to the smaller side; here its returned weights keep all that arithmetic."""
    donor = lively(functools.partial(libraries.transformers_swin, attn_implementation="eager", window_size=7))
    converted = attnrewrite.convert(donor, "identity", images(1, (56, 56)), progress=False)
    for size in [(56, 56), (224, 56), (56, 224), (112, 56), (84, 112)]:
        found = compare(converted, donor, images(2, size), tolerance=1e-6)  # its softmax is in float32
        assert found[0] in ("equal", "refused"), (size, found)


@pytest.mark.parametrize(
    ("make", "captured", "others"),
    [
        pytest.param(libraries.timm_vit, (32, 32), [(48, 48), (16, 64), (32, 40), (64, 64)], id="timm ViT"),
        pytest.param(libraries.timm_pvt, (64, 64), [(96, 96), (32, 128), (64, 96), (128, 128)], id="timm PVT"),
        pytest.param(
            libraries.transformers_segformer, (64, 64), [(96, 96), (32, 128), (64, 96), (128, 128)], id="SegFormer"
        ),
        pytest.param(
            libraries.torchvision_swin, (128, 128), [(192, 192), (128, 256), (128, 160)], id="torchvision Swin"
        ),
    ],
)
def test_models_of_any_size_follow_the_image(make, captured, others):
    right(make, captured, others, IDENTITY)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("others", [[(128, 128), (64, 128)], [(128, 64), (96, 128)]], ids=str)
@pytest.mark.parametrize("make", [libraries.torchvision_swin, libraries.timm_swin], ids=lambda make: make.__name__)
def test_a_swin_whose_last_stage_is_one_window_at_capture_follows_the_image(make, others, target):
    right(make, (64, 64), others, {target: TARGETS[target]})


@pytest.mark.parametrize("target", thinned(TARGETS, 2))
@pytest.mark.parametrize("make", [libraries.torchvision_swin, libraries.timm_swin], ids=lambda make: make.__name__)
def test_a_swin_of_several_windows_at_capture_follows_the_image(make, target):
    right(make, (128, 128), [(192, 128), (128, 256), (256, 128)], {target: TARGETS[target]})
