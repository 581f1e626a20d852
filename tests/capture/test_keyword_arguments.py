"""Arguments that a trainer passes down through ``**kwargs`` pass by a rewritten module, if it could not read them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import difference, images, small_model
from torch import nn

import attnrewrite
from attnrewrite.errors import ConversionError


def masked(scores, mask=None, **others):
    return scores if mask is None else scores + mask


def scaled(scores, **others):
    return scores * others.get("temperature", 1.0)


def composed(scores, **others):
    kind = "slope"
    return scores * others.get(f"score_{kind}", 1.0)


def summed(scores, **others):
    for value in others.values():
        scores = scores + value
    return scores


NAMES = ("sharpness", "flatness")


def listed(scores, **others):
    for name in NAMES:
        scores = scores * others.get(name, 1.0)
    return scores


def enclosed(name):
    def read(scores, **others):
        return scores * others.pop(name, 1.0)

    return read


class Options:
    slope = 1.0

    def __init__(self, **given):
        vars(self).update(given)


def as_attribute(scores, **others):
    return scores * Options(**others).slope


def defaulted(scores, names=("wide", "narrow"), **others):
    return scores * others.get(names[1], 1.0)


def sorted_names(scores, **others):
    return scores * (1 + sum(len(name) for name in sorted(others) if name.endswith("sk")))


def multiplied(scores, **others):
    for value in others.values():
        if isinstance(value, int | float):
            scores = scores * value
    return scores


def counted(scores, **others):
    return scores * (1 + len(others))


READERS = {
    "mask": masked,
    "temperature": scaled,
    "score_slope": composed,
    "anything": summed,
    "flatness": listed,
    "gain": enclosed("gain"),
    "slope": as_attribute,
    "narrow": defaulted,
    "factor": multiplied,
    "another": counted,
}


class Attention(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.qkv, self.proj, self.change = nn.Linear(32, 96), nn.Linear(32, 32), change

    def forward(self, x, **kwargs):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
        scores = self.change(q @ k.transpose(-2, -1) * 0.25, **kwargs)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 8, 8)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Net(nn.Module):
    """Its own code, which reads ``num_items_in_batch``, is not rewritten."""

    def __init__(self, change):
        super().__init__()
        self.stem, self.attention, self.head = Stem(), Attention(change), nn.Linear(32, 5)

    def forward(self, x, labels=None, **kwargs):
        logits = self.head(self.attention(self.stem(x), **kwargs).mean(1))
        if labels is None:
            return logits
        loss = F.cross_entropy(logits, labels, reduction="sum") / kwargs.get("num_items_in_batch", 1)
        return loss, logits


def converted_net(name, **given):
    torch.manual_seed(0)
    donor = Net(READERS[name]).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    return donor, attnrewrite.convert(donor, "identity", {"x": x[:1], **given}, progress=False), x


@pytest.mark.parametrize("name", ["mask", "temperature", "score_slope"])
@pytest.mark.parametrize("count", [2, torch.tensor(2.0)])
def test_what_the_module_cannot_read_passes_by_it(name, count):
    donor, converted, x = converted_net(name)
    labels = torch.tensor([1, 3])
    expected = donor(x, labels=labels, num_items_in_batch=count)
    actual = converted(x, labels=labels, num_items_in_batch=count)
    assert difference(actual[0], expected[0]) < 1e-12
    assert difference(actual[1], expected[1]) < 1e-12


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0, dtype=torch.float64)])
def test_what_it_may_read_is_refused(name, value):
    _, converted, x = converted_net(name)
    with pytest.raises(ConversionError, match=rf"kwargs\['{name}'\] was not passed when this module was converted"):
        converted(x, **{name: value})
    with pytest.raises(ConversionError, match=name):
        converted(x, **{name: None})


def test_an_argument_of_the_example_is_not_needed_if_nothing_reads_it():
    donor, converted, x = converted_net("mask", num_items_in_batch=torch.tensor(2.0), note="anything", seed=7)
    assert difference(converted(x), donor(x)) < 1e-12
    assert difference(converted(x, note="another"), donor(x)) < 1e-12


def test_an_argument_of_the_example_that_was_read_is_needed():
    donor, converted, x = converted_net("temperature", temperature=2.0)
    assert difference(converted(x, temperature=2.0), donor(x, temperature=2.0)) < 1e-12
    with pytest.raises(ConversionError, match=r"kwargs\['temperature'\] was passed when .* is missing now"):
        converted(x)
    with pytest.raises(ConversionError, match=r"was 2\.0 when this module was converted and is 3\.0 now"):
        converted(x, temperature=3.0)


class Given(nn.Module):
    """Adds all that it finds in containers to its logits."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = Stem(), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x, options={}, masks=(), *more):  # noqa: B006  # what people write
        q, k, v = self.qkv(self.stem(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        logits = self.head(((q @ k.mT * 0.25).softmax(-1) @ v).transpose(1, 2).flatten(2).mean(1))
        return sum((*options.values(), *masks, *more), logits)


MASK = torch.linspace(-1, 1, 5, dtype=torch.float64)
ARGUMENTS = [((), ({},), ({"a": MASK},)), (({"a": MASK},), ({"a": MASK, "b": MASK},), ({"b": MASK},), ())]
ARGUMENTS += [(({}, [MASK]), ({}, [MASK, MASK]), ({}, [])), (({}, (), MASK), ({}, ()), ({}, (), MASK, MASK))]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_containers_have_the_parts_of_the_captured_call(arguments):
    torch.manual_seed(0)
    donor, x = Given().double().eval(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    captured, *others = arguments
    converted = attnrewrite.convert(donor, "identity", (x, *captured), progress=False)
    for given in (captured, *others):
        expected = donor(x, *given)
        try:
            actual = converted(x, *given)
        except ConversionError:
            actual = None
        assert actual is not None or given is not captured
        assert actual is None or difference(actual, expected) < 1e-12


def test_arguments_pass_by_under_a_compiler():
    donor, converted, x = converted_net("mask")
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    count = torch.tensor(2.0)
    labels = torch.tensor([1, 3])
    expected = donor(x, labels=labels, num_items_in_batch=count)[0]
    assert difference(compiled(x, labels=labels, num_items_in_batch=count)[0], expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *itertools.product(["transformers_vit", "transformers_vit_eager"], ["identity", "conv_glu"]),
        pytest.param("transformers_swin", "conv_glu", marks=pytest.mark.slow),
        ("transformers_vit", "tokens_to_token"),
    ],
)
def test_labels_and_counts_reach_the_loss_of_transformers_models(name, to):
    donor = small_model(name).float()
    x, labels = images(name, 2, torch.float32), torch.tensor([1, 4])
    converted = attnrewrite.convert(donor, to, x[:1], progress=False)
    given = {"labels": labels, "num_items_in_batch": torch.tensor(2)}
    output = converted(x, **given)
    if to == "identity":
        assert difference(output.loss, donor(x, **given).loss) < 1e-5
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert attnrewrite.convert(donor, to, {"pixel_values": x, **given}, progress=False)(x).loss is None
