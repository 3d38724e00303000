"""Options of the shape of a plan: what they take, and what they refuse."""

import pytest

import reap_driver as rd


def test_a_shape_is_experts_by_neurons() -> None:
    assert rd.ShapeOptions(shape="24x32").explicit == (24, 32)
    assert rd.ShapeOptions(shape="96x512", width_multiple=128).explicit == (96, 512)
    assert rd.ShapeOptions(shape="auto").explicit is None
    assert rd.ShapeOptions().explicit is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"shape": "24"}, "`shape=24`: give auto, or experts and neurons"),
        ({"shape": "0x32"}, "`shape=0x32`: give auto"),
        ({"shape": "24x32x2"}, "`shape=24x32x2`: give auto"),
        ({"shape": "24x40", "width_multiple": 16}, "40 neurons are not a multiple of"),
        ({"width_multiple": 16}, "`width_multiple=16`: only with `shape`"),
        ({"ridge": 0.1}, "`ridge=0.1`: only with `shape`"),
        ({"shape": "auto", "width_multiple": 0}, "`width_multiple=0`: give a whole number above 0"),
        ({"shape": "auto", "ridge": 0.0}, "`ridge=0`: give a number above 0"),
        ({"shape": "auto", "ridge": float("nan")}, "`ridge=nan`: give a number above 0"),
    ],
)
def test_wrong_shapes_are_named(given, text) -> None:
    with pytest.raises(rd.OptionError) as found:
        rd.ShapeOptions(**given)
    assert text in str(found.value)
