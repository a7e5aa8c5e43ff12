"""The verdict leaves room for the driver, and the device is the one asked for."""

from instruct_trl.memory.plan import MemoryPlan, Phase
from instruct_trl.memory.report import GB, Device, Stage, report, this_device
from instruct_trl.memory.roles import Item


def fixed(size, phase="update"):
    item = Item("model", "weights", size)
    return MemoryPlan((item,), (Phase(phase, (Item("model", "activations", 10 * GB),)),))


def test_the_verdict_leaves_room_for_the_driver():
    device = Device("a card", 20 * GB, True)  # 5 % and half a GB stay free
    assert device.usable == 18.5 * GB
    ok = report(Stage("x", lambda _: fixed(int(8.5 * GB)), {}, {}), device)
    assert ok.splitlines()[-1] == "fits: 0.0 MB to spare"
    bad = report(Stage("x", lambda _: fixed(int(8.5 * GB) + 1), {}, {}), device)
    assert bad.splitlines()[-1].startswith("does not fit: ")


def test_the_device_is_a_card_of_that_size_or_what_is_there():
    assert this_device(16) == Device("a GPU with 16 GB", 16 * GB, True)
    assert this_device().memory > GB
