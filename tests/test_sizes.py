import logging

import pytest

from stdit_fast.errors import ConfigError
from stdit_fast.resolutions import load_resolutions
from stdit_fast.sample.sizes import output_size


@pytest.mark.parametrize(
    "resolution, aspect_ratio, size",
    [
        ("240p", None, (240, 426)),
        ("4k", None, (2160, 3840)),
        ("256", None, (256, 256)),
        (1024, None, (1024, 1024)),
        ("240p", "16:9", (240, 426)),
        ("240p", "9:16", (426, 240)),
        ("240p", "0.56", (240, 426)),
        ("240p", 1.78, (426, 240)),
        ("240p", "1:1", (320, 320)),
        ("240p", 1, (320, 320)),
        ("480p", "4:3", (554, 738)),
        ("512", "16:9", (384, 672)),
        ("720p", "1280:720", (720, 1280)),
    ],
)
def test_a_resolution_and_an_aspect_ratio(resolution, aspect_ratio, size, caplog):
    with caplog.at_level(logging.INFO):
        assert output_size(resolution, aspect_ratio) == size
    assert not caplog.messages


def test_every_aspect_ratio_of_the_table_is_its_own_nearest():
    for name, entry in load_resolutions().items():
        for aspect, size in entry["sizes"].items():
            assert output_size(name, aspect) == size


def test_an_aspect_ratio_far_from_the_table_is_told(caplog):
    assert output_size("240p", "21:9") == (210, 490)
    assert not caplog.messages
    assert output_size("240p", "4:1") == (196, 522)
    (message,) = caplog.messages
    assert message == "aspect_ratio 4:1 (height / width 0.25): the nearest of 240p is 0.38, 196 x 522 (height x width)"


def test_height_and_width():
    assert output_size(height=240, width=424) == (240, 424)
    assert output_size(height=16, width=16) == (16, 16)
    assert output_size(height=60, width=106) == (60, 106)  # as training's buckets have them


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "resolution = .*give a resolution, such as '240p', or height and width"),
        ({"aspect_ratio": "16:9"}, "resolution = .*give a resolution"),
        ({"resolution": "241p"}, "resolution = '241p': there is no such resolution: did you mean '240p'"),
        ({"resolution": "240p", "height": 240, "width": 424}, "resolution = '240p': leave it out, or height and width"),
        ({"aspect_ratio": 1.0, "height": 240, "width": 424}, "aspect_ratio = 1.0: leave it out"),
        ({"resolution": "240p", "width": 424}, "resolution = '240p': leave it out"),
        ({"height": 240}, "width = None: height and width are needed, both"),
        ({"width": 240}, "height = None: height and width are needed, both"),
        ({"height": 240, "width": 8}, "width = 8: use a whole number of pixels, 16 or more"),
        ({"height": 240, "width": 424.0}, "width = 424.0: use a whole number"),
        ({"height": -16, "width": 424}, "height = -16: use a whole number"),
        *(
            ({"resolution": "240p", "aspect_ratio": bad}, "aspect_ratio = .*: use width:height, as '16:9', or")
            for bad in ("wide", "16:", "0", "-1", "16:0", "0:9", "nan", "inf", "1:2:3", 0)
        ),
    ],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        output_size(**arguments)
