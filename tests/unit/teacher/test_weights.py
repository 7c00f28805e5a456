# SPDX-License-Identifier: Apache-2.0
"""The teacher's weights follow the student's exactly, or nothing is written."""

import pytest
import torch

from opd_ext.teacher.weights import copy_shards, ema_shards


def shards(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (5,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def test_a_hard_refresh_is_bit_exact_and_keeps_storage():
    student, teacher = shards(seed=1), shards(seed=2)
    addresses = {name: tensor.data_ptr() for name, tensor in teacher.items()}
    copy_shards(student, teacher)
    assert all(teacher[name].equal(student[name]) for name in student)
    assert addresses == {name: tensor.data_ptr() for name, tensor in teacher.items()}


def test_a_refresh_rounds_to_the_teachers_dtype():
    student, teacher = shards(torch.float32, 1), shards(torch.bfloat16, 2)
    copy_shards(student, teacher)
    assert all(teacher[name].equal(student[name].bfloat16()) for name in student)


def test_parameters_that_require_gradients_are_written_without_a_graph():
    student = {name: tensor.requires_grad_() for name, tensor in shards(seed=1).items()}
    teacher = {name: tensor.requires_grad_() for name, tensor in shards(seed=2).items()}
    copy_shards(student, teacher)
    ema_shards(student, teacher, 0.3)
    assert all(tensor.is_leaf and tensor.grad_fn is None for tensor in teacher.values())


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_moving_average_are_frozen_and_live(rate):
    student, teacher = shards(seed=1), shards(seed=2)
    expected = student if rate == 1.0 else shards(seed=2)
    ema_shards(student, teacher, rate)
    assert all(teacher[name].equal(expected[name]) for name in expected)


def test_the_moving_average_is_computed_in_float32_and_rounded_once():
    student, teacher = shards(torch.bfloat16, 1), shards(torch.bfloat16, 2)
    before = {name: tensor.float() for name, tensor in teacher.items()}
    ema_shards(student, teacher, 0.3)
    for name, tensor in teacher.items():
        assert tensor.equal(torch.lerp(before[name], student[name].float(), 0.3).bfloat16())


def test_float64_weights_stay_float64():
    student, teacher = shards(torch.float64, 1), shards(torch.float64, 2)
    expected = 0.9 * teacher["a"] + 0.1 * student["a"]
    ema_shards(student, teacher, 0.1)
    torch.testing.assert_close(teacher["a"], expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("move", [copy_shards, lambda src, dst: ema_shards(src, dst, 0.5)])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda teacher: teacher.pop("b"), "exist on one side only, for example 'b'"),
        (lambda teacher: teacher.update(c=torch.zeros(1)), "exist on one side only, for example 'c'"),
        (lambda teacher: teacher.update(b=torch.zeros(6)), r"'b' has local shape \(5,\) .* and \(6,\)"),
    ],
)
def test_different_names_or_shapes_are_refused_before_anything_is_written(move, damage, message):
    student, teacher = shards(seed=1), shards(seed=2)
    damage(teacher)
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    with pytest.raises(ValueError, match=message):
        move(student, teacher)
    assert all(teacher[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match="student's share"):
        ema_shards(shards(), shards(), rate)
