"""The container of what a network is conditioned on."""

import dataclasses

import pytest
import torch

from tessera.conditioning import NULL_LABEL, Condition


def test_a_list_becomes_an_int64_tensor():
    label = Condition([0, 2]).label
    assert label.dtype == torch.int64
    assert label.tolist() == [0, 2]


def test_indexing_selects_rows():
    condition = Condition([5, 6, 7])
    assert condition[1:].label.tolist() == [6, 7]
    assert condition[torch.tensor([True, False, True])].label.tolist() == [5, 7]
    assert condition[torch.tensor([2, 0, 2])].label.tolist() == [7, 5, 7]


def test_drop_and_null_give_the_null_label_and_leave_the_original_unchanged():
    condition = Condition([0, 2, 1])
    assert condition.drop(torch.tensor([True, False, True])).label.tolist() == [NULL_LABEL, 2, NULL_LABEL]
    assert condition.null().label.tolist() == [NULL_LABEL] * 3
    assert condition.label.tolist() == [0, 2, 1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        condition.label = None


def test_without_labels_there_is_nothing_to_drop():
    condition = Condition()
    assert condition.drop(torch.tensor([True])).label is None
    assert condition.null().label is None
    assert condition[:1].label is None
    assert condition.to("cpu").label is None
    assert Condition.cat((condition, condition)).label is None


def test_cat_keeps_the_order():
    assert Condition.cat((Condition([1, 2]), Condition([3]), Condition([0]))).label.tolist() == [1, 2, 3, 0]
    with pytest.raises(ValueError, match="with and without .*label"):
        Condition.cat((Condition([1]), Condition()))


def test_to_moves_every_field():
    assert Condition([1]).to("meta").label.is_meta
