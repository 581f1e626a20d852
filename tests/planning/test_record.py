"""A record says what a conversion did: it is written, read, and done again to another model of the architecture."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from attnrewrite.patterns.targets.neighborhood import Neighborhood
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_queries import converted_sites, rewritten_names, run
from plugins import run as run_apart
from small_models import images, small_model
from torch import nn
from untouched import assert_untouched, values_of

import attnrewrite
from attnrewrite.errors import ArgumentError, ConversionError
from attnrewrite.planning.record import Record

CASES = {
    "timm_vit": ("neighborhood", {"kernel_size": (3, 1)}),
    "torchvision_vit": ("identity", {}),
    "transformers_vit": ("manhattan", {"decay": None}),
    "timm_swin": ({"layers.0.*": "aggregated", "*": Neighborhood()}, {}),
}


def converted(name, **options):
    to, given = CASES[name]
    return attnrewrite.convert(small_model(name), to, images(name), progress=False, **given, **options)


@pytest.fixture(scope="module")
def vit():
    return converted("timm_vit", keep="blocks.0.*")


@pytest.fixture(scope="module")
def text(vit):
    return attnrewrite.record(vit).to_json()


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_as_it_was_written_and_gives_the_same_model(name):
    model = converted(name)
    record = attnrewrite.record(model)
    read = Record.from_json(record.to_json())
    assert read == record
    again = attnrewrite.replay(small_model(name), read, images(name), progress=False)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    assert rewritten_names(again) == rewritten_names(model)
    assert torch.equal(run(again, images(name)), run(model, images(name)))
    assert [site.exactness for site in attnrewrite.report(again).sites] == [
        site.exactness for site in attnrewrite.report(model).sites
    ]


def test_what_is_done_again_is_recorded_alike(vit):
    record = attnrewrite.record(vit)
    again = attnrewrite.record(attnrewrite.replay(small_model("timm_vit"), record, images("timm_vit"), progress=False))
    assert again.inputs == {"x": (2, 3, 64, 64)}
    assert [site.status for site in again.sites] == [site.status for site in record.sites]
    measured = [site.conversion for site in record.sites if site.conversion is not None]
    replayed = [site.conversion for site in again.sites if site.conversion is not None]
    assert [each.error is None for each in measured] == [False]
    assert replayed == [replace(each, error=None) for each in measured]


def test_it_says_what_was_asked_and_what_became_of_it(vit):
    record = attnrewrite.record(vit)
    assert (record.model, record.fidelity, record.to["*"].options["kernel_size"]) == (
        "VisionTransformer", "projected", (3, 1),
    )  # fmt: skip
    fates = {site.name: (site.status, site.why) for site in record.sites if site.kind == "attention"}
    assert fates == {"blocks.0.attn": ("kept", "keep"), "blocks.1.attn": ("converted", "")}
    assert record.versions["torch"] == torch.__version__
    assert record.output_error == attnrewrite.report(vit).output_error


def test_a_plan_gives_its_record_before_it_is_applied():
    plan = attnrewrite.plan(small_model("timm_vit"), "identity", images("timm_vit"))
    record = plan.drop("blocks.0.*").record()
    model = attnrewrite.replay(small_model("timm_vit"), record, images("timm_vit"), progress=False)
    assert converted_sites(model) == converted_sites(plan.drop("blocks.0.*").apply())
    assert "blocks.0.attn" in converted_sites(plan.apply())


def test_the_number_of_a_site_among_its_target_s_counts():
    """Dilations alternate by it, and the first of them is left out here."""
    model = small_model("timm_vit", depth=3)
    plan = attnrewrite.plan(model, "dilated_neighborhood", images("timm_vit"), kernel_size=2).drop("blocks.0.*")
    expected = plan.apply()
    again = attnrewrite.replay(model, plan.record(), images("timm_vit"), progress=False)
    assert torch.equal(run(again, images("timm_vit")), run(expected, images("timm_vit")))
    settings = [[site.settings for site in attnrewrite.report(each).converted] for each in (again, expected)]
    assert settings[0] == settings[1]


def test_without_inputs_one_image_is_drawn(vit):
    again = attnrewrite.replay(small_model("timm_vit"), attnrewrite.record(vit), progress=False)
    assert torch.equal(run(again, images("timm_vit")), run(vit, images("timm_vit")))


def test_a_model_converted_twice_is_converted_twice_again():
    first = converted("timm_swin")
    twice = attnrewrite.convert(first, "conv_glu", images("timm_swin"), progress=False)
    record = Record.from_json(attnrewrite.record(twice).to_json())
    assert record.earlier == attnrewrite.record(first)
    donor = small_model("timm_swin")
    before = values_of(donor)
    again = attnrewrite.replay(donor, record, images("timm_swin"), progress=False)
    assert_untouched(donor, before)
    assert again.state_dict().keys() == twice.state_dict().keys()
    broken = replace(record, sites=record.sites[:-1])
    with pytest.raises(ConversionError, match="has more in"):
        attnrewrite.replay(donor, broken, images("timm_swin"), inplace=True, progress=False)
    assert_untouched(donor, before)


def test_it_goes_with_copies_and_is_taken_back(vit):
    record = attnrewrite.record(vit)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert attnrewrite.record(other) == record
        with pytest.raises(ArgumentError, match="was not made by"):
            attnrewrite.record(attnrewrite.revert(other))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda: small_model("timm_vit", depth=3), None, r"this VisionTransformer has more in blocks\.2\.attn,"),
        (lambda: small_model("timm_vit", depth=1), None, r"blocks\.1\.attn, its attention, is not in this Vis"),
        (lambda: small_model("timm_vit", num_heads=2), None, r"record: blocks\.0\.attn was attention .* heads 3x16"),
        (lambda: small_model("torchvision_vit"), images("timm_vit"), r"record: blocks\.0\.attn, its attention, is not"),
        (lambda: small_model("timm_vit"), images("timm_vit", 1), r"example_inputs: .* x 2x3x64x64, got x 1x3x64x64"),
        (lambda: nn.Conv2d(3, 8, 4), None, r"blocks\.0\.attn, its attention, is not in this Conv2d|got input 2x3"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_the_name_of_what_differs(vit, model, example, message):
    with pytest.raises((ConversionError, ArgumentError), match=message):
        attnrewrite.replay(model(), attnrewrite.record(vit), example, progress=False)


def test_a_site_that_would_be_of_another_class_is_refused():
    """The same weights are no question of class, but what was recorded is not believed."""
    record = attnrewrite.record(converted("torchvision_vit"))
    claimed = tuple(
        replace(site, conversion=site.conversion and replace(site.conversion, exactness="FRESH"))
        for site in record.sites
    )
    with pytest.raises(ConversionError, match=r"became FRESH identity .*, and would be EXACT here"):
        attnrewrite.replay(
            small_model("torchvision_vit"), replace(record, sites=claimed), images("torchvision_vit"), progress=False
        )


@dataclass(frozen=True)
class Mine(Neighborhood):
    """Another target under a name that is taken."""


def test_a_target_of_the_same_name_is_not_taken_for_it():
    model = attnrewrite.convert(small_model("timm_vit"), Mine(kernel_size=3), images("timm_vit"), progress=False)
    record = Record.from_json(attnrewrite.record(model).to_json())
    with pytest.raises(ArgumentError, match=r"record\.to\.\*: target 'neighborhood' is .*, and was .*\.Mine; install"):
        attnrewrite.replay(small_model("timm_vit"), record, images("timm_vit"), progress=False)


def test_options_that_cannot_be_written_are_named(text):
    document = json.loads(text)
    document["to"]["*"]["opaque"] = ["covariance"]
    with pytest.raises(ArgumentError, match=r"record\.to\.\*: covariance of target 'neighborhood' cannot be written"):
        attnrewrite.replay(small_model("timm_vit"), Record.from_json(json.dumps(document)), progress=False)


def test_options_that_are_not_taken_any_more_are_named(text):
    document = json.loads(text)
    document["to"]["*"]["options"]["colour"] = 3
    with pytest.raises(ArgumentError, match=r"(?s)record\.to\.\*: target 'neighborhood' does not take .*colour"):
        attnrewrite.replay(small_model("timm_vit"), Record.from_json(json.dumps(document)), progress=False)


def test_a_package_that_is_not_installed_is_named(text, tmp_path):
    (tmp_path / "record.json").write_text(text.replace("neighborhood", "vicinity"))
    code = """
import attnrewrite, torch
from attnrewrite.errors import ArgumentError
from attnrewrite.planning.record import Record
try:
    attnrewrite.replay(torch.nn.Linear(2, 2), Record.from_json(open("record.json").read()))
except ArgumentError as error:
    print(error)
"""
    told = run_apart(code, tmp_path)
    assert told.startswith("record.to.*: unknown target 'vicinity'")
    assert "install the package that brings attnrewrite.patterns.targets.vicinity.Neighborhood" in told


def test_what_is_no_record_is_refused():
    with pytest.raises(ArgumentError, match=r"record: expected a Record, got str; read one with attnrewrite\.Record"):
        attnrewrite.replay(small_model("timm_vit"), "{}")


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.0])
def test_another_schema_version_is_refused(text, version):
    document = json.loads(text) | {"schema_version": version}
    with pytest.raises(ArgumentError, match=r"record\.schema_version: this version .* reads 1, got"):
        Record.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"schema_version": NaN}'])
def test_what_is_no_document_is_refused(text):
    with pytest.raises(ArgumentError, match=r"record"):
        Record.from_json(text)


def places(value, path=()):
    """Everything in a document that can be replaced, by the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(document, path, value):
    holder = document = copy.deepcopy(document)
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return document


def spelled(path):
    return "record" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_malformed_field_is_named(text, data):
    """Whatever stands in one place: the document is refused by that place or one around it, or is still a record."""
    document = json.loads(text)
    path = data.draw(st.sampled_from([path for path in places(document) if path]))
    document = changed(document, path, data.draw(JSON | st.just(...)))
    try:
        record = Record.from_json(json.dumps(document))
    except ArgumentError as error:
        told = str(error).split(": ")[0]
        assert told.startswith("record")
        assert any(told.startswith(spelled(path[:length])) for length in range(len(path) - 1, len(path) + 1)), told
    else:
        assert Record.from_json(record.to_json()).to_json() == record.to_json()


@given(document=JSON)
@settings(max_examples=200, deadline=None)
def test_whatever_else_is_json_is_refused_too(document):
    with pytest.raises(ArgumentError, match=r"^record"):
        Record.from_json(json.dumps(document))
