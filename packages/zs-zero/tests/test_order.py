"""Prediction of the next unit."""

from zs_zero.order import Order


def run(order, events):
    hits = 0
    for event in events:
        hits += order.predict() == event
        order.observe(event)
    return hits


def test_a_repeated_order_is_predicted():
    step = [(0, "forward"), (1, "forward"), (2, "forward"), (2, "backward"), (1, "backward"), (0, "backward")]
    order = Order()
    assert run(order, step) == 0
    assert order.changes == 0
    run(order, step)
    assert run(order, step) == len(step)


def test_a_unit_used_twice_is_told_apart_by_what_came_before():
    step = [(0, "forward"), (1, "forward"), (0, "forward"), (2, "forward")]
    order = Order()
    run(order, step + step)
    assert run(order, step * 2) == 8


def test_a_changed_order_is_counted_and_learnt():
    first = [(0, "forward"), (1, "forward"), (2, "forward")]
    second = [(0, "forward"), (2, "forward"), (1, "forward")]
    order = Order()
    run(order, first * 3)
    assert order.changes == 0
    run(order, second * 2)
    assert order.changes > 0
    assert run(order, second) == 3
