"""The icons that ship with the package, as tasks."""

from __future__ import annotations

from collections import Counter

import pytest

from pt_core.errors import InputError
from pt_vl.backbones import load_backbone
from pt_vl.icons import IconChoice, shipped


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("zoo:mini-clip")


def test_sixteen_shots_of_every_class_and_validation_images_beside_them(backbone) -> None:
    task = IconChoice(level="class", groups=("animal", "food")).task(backbone, shots=16, seed=3)
    assert task.spec.class_names[:2] == ("bird", "sea animal") and len(task.spec.class_names) == 13
    assert Counter(task.train.rows.labels) == dict.fromkeys(range(13), 16)
    assert set(Counter(task.validation.rows.labels).values()) == {4}
    assert Counter(task.test.rows.labels) == dict.fromkeys(range(13), 20)
    assert not {*task.train.ids} & {*task.validation.ids}
    few = IconChoice(level="class", groups=("animal", "food")).task(backbone, shots=4, seed=3)
    assert {*few.train.ids} < {*task.train.ids}, "nested"


def test_four_shots_of_every_concept_by_vendors_that_are_not_tested(backbone) -> None:
    task = IconChoice().task(backbone, shots=4, seed=1)
    count = len(task.spec.class_names)
    assert count == 63 and list(task.spec.class_names) == sorted(task.spec.class_names)
    assert Counter(task.train.rows.labels) == dict.fromkeys(range(count), 4)
    assert Counter(task.validation.rows.labels) == dict.fromkeys(range(count), 1)
    assert min(Counter(task.test.rows.labels).values()) >= 4
    drawn = {name.replace("-monotone", "") for name in [*task.train.ids, *task.validation.ids]}
    assert not drawn & {name.replace("-monotone", "") for name in task.test.ids}


def test_a_domain_keeps_the_classes_that_it_has_images_of(backbone) -> None:
    source = IconChoice(level="class", domains=("emoji",)).task(backbone, shots=1)
    assert "screen" not in source.spec.class_names, "no emoji to train on"
    target = IconChoice(level="class", domains=("map",), classes=source.spec.class_names, train=False).task(backbone)
    assert target.train is None and set(target.spec.class_names) < set(source.spec.class_names)
    assert len(target.test) == len([1 for d, s, c in zip(*(shipped()[0]["images"][k] for k in ("domain", "split", "class")),
                                                         strict=True)
                                    if (d, s) == ("map", "test") and c in target.spec.class_names])  # fmt: skip


def test_a_choice_that_leaves_nothing_is_refused(backbone) -> None:
    with pytest.raises(InputError, match="there is no concept 'owls'"):
        IconChoice(classes=("owls", "key")).task(backbone)
    with pytest.raises(InputError, match="fewer than two classes"):
        IconChoice(level="class", groups=("food",), classes=("bird", "fruit")).task(backbone)
    with pytest.raises(InputError, match="no model 'clip' ships with pt-vl.*zoo:mini-clip"):
        load_backbone("zoo:clip")
